// Puts the rows of $tensor that a workgroup owns in workgroup memory, from where its subgroups load their left operands.
// Needs: coop_tiles.wgsl, ROWS, read_$tensor; $eights and $stride: how many times eight elements a row has, and how far apart rows are.
// Gives: store_own_$tensor.

// How many times eight elements each thread moves.
const $tensor_moves = (ROWS * $eights + THREADS - 1u) / THREADS;

// Stores ROWS rows, from row0 on, with 0 in the columns past the row's `dim` elements, so that they add nothing, whatever they are multiplied
// with.
fn store_own_$tensor(at: Sequence, row0: u32, dim: u32, thread: u32) {
    for (var n = 0u; n < $tensor_moves; n++) {
        let t = thread + n * THREADS;
        let row = $tensor_row(at, min(row0 + t / $eights, last_query(at)));
        let d = 8u * (t % $eights);
        let x = first_elements(read_$tensor(row, d, dim), max(d, dim) - d);
        if t < ROWS * $eights {
            store_eight(t / $eights * $stride + 8u / WIDTH * (t % $eights), x);
        }
    }
}
