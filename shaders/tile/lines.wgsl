// $lines whole rows of $tensor, with $columns vectors a thread: loaded to registers while what is in workgroup memory is in use,
// then stored there at $at, as f32. Rows past `last` are that one over again. Line l of rows spread over `threads` threads by fours is
// the row that the scores of line l belong to.
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
