// Loads a chunk of both operands of $scores to registers, as f32: columns d0 .. d0 + CHUNK of OWN rows of $own and of STEP rows
// of $step. A row past the last one is the last one again.
// Needs: OWN4, STEP4, CHUNK4, THREADS, CHUNK_LOADS, Chunks, read_$own, read_$step. Gives: load_chunks_$scores.

fn load_chunks_$scores(
    at: Sequence,
    own_first: u32,
    own_last: u32,
    step_first: u32,
    step_last: u32,
    d0: u32,
    dim: u32,
    thread: u32,
) -> Chunks {
    var x: Chunks;
    for (var n = 0u; n < CHUNK_LOADS; n++) {
        let t = thread + n * THREADS;
        let d = d0 + 4u * (t % CHUNK4);
        if t < OWN4 * CHUNK4 {
            for (var r = 0u; r < 4u; r++) {
                let row = min(own_first + 4u * (t / CHUNK4) + r, own_last);
                x[n][r] = read_$own($own_row(at, row), d, dim);
            }
        } else if t < (OWN4 + STEP4) * CHUNK4 {
            for (var r = 0u; r < 4u; r++) {
                let row = min(step_first + 4u * (t / CHUNK4 - OWN4) + r, step_last);
                x[n][r] = read_$step($step_row(at, row), d, dim);
            }
        }
    }
    return x;
}
