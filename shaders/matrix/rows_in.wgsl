// Columns d .. d + M of the $rows rows of $tensor that a workgroup owns, from row `first` on, to where get_left finds them. Columns past
// the head dimension are 0, so that they add nothing, whatever they are multiplied with.
// Needs: exchange.wgsl, THREADS, read_$tensor. Gives: put_$tensor.

fn put_$tensor(at: Sequence, first: u32, last: u32, d: u32, thread: u32) {
    for (var t = thread; t < $rows * M / 8u; t += THREADS) {
        let row = t / (M / 8u);
        let column = 8u * (t % (M / 8u));
        let all = read_$tensor($tensor_row(at, min(first + row, last)), d + column, $dim);
        let x = first_elements(all, max(d + column, $dim) - (d + column));
        let place = row * EXCHANGE_STRIDE + column / WIDTH;
#if SCALARS
        for (var c = 0u; c < 4u; c++) {
            halves[place + c] = x.low[c];
            halves[place + 4u + c] = x.high[c];
        }
#else
        halves[place] = x.low;
        halves[place + 1u] = x.high;
#endif
    }
}
