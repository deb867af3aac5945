// Loads $lines whole rows of $tensor, $columns vectors a thread, to registers; then stores them at $at in workgroup memory, as f32. A row
// past `last` is the last one again.
// Needs: THREADS, THREADS_X, LINES_LOADS, Lines, tiles, read_$tensor. Gives: load_lines_$tensor, store_lines_$tensor.
//
// Scores are stored in the order of threads, so line l is not row l. With T = `threads`, line l belongs to row
// (l / 4T) · 4T + (l mod T) · 4 + (l mod 4T) / T.
fn load_lines_$tensor(at: Sequence, first: u32, last: u32, threads: u32, l0: u32, dim: u32, thread: u32) -> Lines {
    const width = $columns * THREADS_X;
    let piece = 4u * threads;
    var x: Lines;
    for (var n = 0u; n < LINES_LOADS; n++) {
        let t = thread + n * THREADS;
        let l = l0 + t / width;
        let row = min(first + l / piece * piece + l % threads * 4u + l % piece / threads, last);
        x[n] = read_$tensor($tensor_row(at, row), 4u * (t % width), dim);
    }
    return x;
}

fn store_lines_$tensor(x: Lines, thread: u32) {
    const width = $columns * THREADS_X;
    for (var n = 0u; n < LINES_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < $lines * width {
            tiles[$at + t] = unpack4(x[n]);
        }
    }
}
