// Rows of $tensor, f32: loaded to registers while what is in workgroup memory is in use, then stored there. Rows past `last`
// are that one over again.
//
// A chunk is CHUNK columns from d0 on of $count rows, transposed: a column is $count / 4 vectors of four rows each. Columns
// past `dim` are 0.
fn load_chunk_$tensor(start: u32, first: u32, last: u32, d0: u32, dim: u32, thread: u32) -> Chunk_$count {
    var x: Chunk_$count;
    for (var n = 0u; n < $count_LOADS; n++) {
        let t = thread + n * THREADS;
        let row = min(first + chunk_row(t, $count), last);
        x[n] = read_$tensor(start + row * problem.$tensor.row, d0 + 4u * chunk_column(t, $count), dim);
    }
    return x;
}

fn store_chunk_$tensor(x: Chunk_$count, at: u32, d0: u32, dim: u32, thread: u32) {
    for (var n = 0u; n < $count_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < $count * CHUNK4 {
            let column4 = chunk_column(t, $count);
            let row = chunk_row(t, $count);
            let d = d0 + 4u * column4;
            let y = first_elements(x[n], select(4u, max(d, dim) - d, dim % CHUNK > 0u));
            for (var e = 0u; e < 4u; e++) {
                tiles[at + (4u * column4 + e) * ($count / 4u) + place(row / 4u, column4)][row % 4u] = y[e];
            }
        }
    }
}

// Lines are whole rows, LINES of them, with $columns vectors a thread. Line l of rows that are spread over `threads` threads
// by fours is the row that the scores of line l belong to.
fn load_lines_$tensor(start: u32, first: u32, last: u32, threads: u32, l0: u32, dim: u32, thread: u32) -> Lines {
    const width = $columns * THREADS_X;
    let piece = 4u * threads;
    var x: Lines;
    for (var n = 0u; n < LINES_LOADS; n++) {
        let t = thread + n * THREADS;
        let l = l0 + t / width;
        let row = min(first + l / piece * piece + l % threads * 4u + l % piece / threads, last);
        x[n] = read_$tensor(start + row * problem.$tensor.row, 4u * (t % width), dim);
    }
    return x;
}

fn store_lines_$tensor(x: Lines, thread: u32) {
    const width = $columns * THREADS_X;
    for (var n = 0u; n < LINES_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < LINES * width {
            tiles[LINES_AT + t] = x[n];
        }
    }
}
