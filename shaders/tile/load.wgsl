// Loads rows of $tensor to registers, then stores them in workgroup memory. A row past `last` is the last one again; columns past `dim` are
// 0. A chunk is CHUNK columns from d0 on of $count rows. A block is all columns of BLOCK rows, with $columns vectors of columns a thread.
// Needs: products.wgsl, memory/elements.wgsl, read_$tensor. Gives: load_chunk_$tensor, store_chunk_$tensor, load_block_$tensor,
// store_block_$tensor.

alias Chunk_$tensor = array<Elements4, $count_LOADS>;

fn load_chunk_$tensor(at: Sequence, first: u32, last: u32, d0: u32, dim: u32, thread: u32) -> Chunk_$tensor {
    var x: Chunk_$tensor;
    for (var n = 0u; n < $count_LOADS; n++) {
        let t = thread + n * THREADS;
        x[n] = read_$tensor($tensor_row(at, min(first + t / CHUNK4, last)), d0 + 4u * (t % CHUNK4), dim);
    }
    return x;
}

// Row n goes to place (n % spread) · ($count / spread) + n / spread: with spread 1 it stays, with TC a thread finds its
// rows THREADS_X apart, so that neighbours read neighbours.
fn store_chunk_$tensor(x: Chunk_$tensor, place: u32, spread: u32, d0: u32, dim: u32, thread: u32) {
    for (var n = 0u; n < $count_LOADS; n++) {
        let t = thread + n * THREADS;
        if t < $count * CHUNK4 {
            let d = d0 + 4u * (t % CHUNK4);
            let row = t / CHUNK4 % spread * ($count / spread) + t / CHUNK4 / spread;
            let count = select(4u, max(d, dim) - d, dim % CHUNK > 0u);
            tiles[place + row * CHUNK_STRIDE + t % CHUNK4] = first_elements(unpack4(x[n]), count);
        }
    }
}

const LOADS_$tensor = (BLOCK * $columns * THREADS_X + THREADS - 1u) / THREADS;
alias Block_$tensor = array<Elements4, LOADS_$tensor>;

fn load_block_$tensor(at: Sequence, first: u32, last: u32, dim: u32, thread: u32) -> Block_$tensor {
    const width = $columns * THREADS_X;
    var x: Block_$tensor;
    for (var n = 0u; n < LOADS_$tensor; n++) {
        let t = thread + n * THREADS;
        x[n] = read_$tensor($tensor_row(at, min(first + t / width, last)), 4u * (t % width), dim);
    }
    return x;
}

fn store_block_$tensor(x: Block_$tensor, dim: u32, thread: u32) {
    const width = $columns * THREADS_X;
    for (var n = 0u; n < LOADS_$tensor; n++) {
        let t = thread + n * THREADS;
        if t < BLOCK * width {
            let d = 4u * (t % width);
            let count = select(4u, max(d, dim) - d, dim % (4u * THREADS_X) > 0u);
            tiles[BLOCK_AT + t] = first_elements(unpack4(x[n]), count);
        }
    }
}
