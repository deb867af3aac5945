// Writes columns d .. d + M of the $rows rows of $tensor that a workgroup owns, from row `first` to before row `end`: `factor` times what
// put_accumulator left in matrix 0 of the blocks.
// Needs: exchange.wgsl, THREADS, write_$tensor. Gives: write_columns_$tensor.

fn write_columns_$tensor(at: Sequence, first: u32, end: u32, d: u32, factor: f32, thread: u32) {
    for (var t = thread; t < $rows * M / 8u; t += THREADS) {
        let row = t / (M / 8u);
        let column = 8u * (t % (M / 8u));
        if first + row < end && d + column < $dim {
            let place = row * EXCHANGE_STRIDE + column / WIDTH;
#if SCALARS
            let low = vec4f(sums[place], sums[place + 1u], sums[place + 2u], sums[place + 3u]);
            let high = vec4f(sums[place + 4u], sums[place + 5u], sums[place + 6u], sums[place + 7u]);
#else
            let low = sums[place];
            let high = sums[place + 1u];
#endif
            write_$tensor($tensor_row(at, first + row), d + column, $dim, factor * low, factor * high);
        }
    }
}
