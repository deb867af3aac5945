// Loads a thread's vectors of $rows rows of $tensor, from row `first` on. A row past `last` is the last one again.
// Needs: THREADS, W4, $rows_LOADS, read_$tensor. Gives: load_$tensor.

fn load_$tensor(at: Sequence, first: u32, last: u32, thread: u32) -> array<Elements4, $rows_LOADS> {
    var x: array<Elements4, $rows_LOADS>;
    for (var n = 0u; n < $rows_LOADS; n++) {
        let t = thread + n * THREADS;
        x[n] = read_$tensor($tensor_row(at, min(first + t / W4, last)), 4u * (t % W4), $dim);
    }
    return x;
}
