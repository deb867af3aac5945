// Rows of $tensor to workgroup memory. Rows past `last` are that one over again, columns past `dim` are 0.

// Columns d0 .. d0 + CHUNK of `count` rows from `first` on. Row n goes to place (n % spread) · (count / spread) + n / spread:
// with spread 1 it stays, with TC a thread finds its rows THREADS_X apart, so that neighbours read neighbours.
fn load_chunk_$tensor(place: u32, count: u32, spread: u32, start: u32, first: u32, last: u32, d0: u32, dim: u32, thread: u32) {
    for (var t = thread; t < count * CHUNK4; t += THREADS) {
        let n = t / CHUNK4;
        let d = d0 + 4u * (t % CHUNK4);
        let x = unpack4(read_$tensor(start + min(first + n, last) * problem.$tensor.row, d, dim));
        let row = (n % spread) * (count / spread) + n / spread;
        tiles[place + row * CHUNK_STRIDE + t % CHUNK4] = first_elements(x, max(d, dim) - d);
    }
}

// BLOCK whole rows from `first` on, of `width` vectors each.
fn load_block_$tensor(start: u32, first: u32, last: u32, dim: u32, width: u32, thread: u32) {
    for (var t = thread; t < BLOCK * width; t += THREADS) {
        let d = 4u * (t % width);
        let x = unpack4(read_$tensor(start + min(first + t / width, last) * problem.$tensor.row, d, dim));
        tiles[BLOCK_AT + t] = first_elements(x, max(d, dim) - d);
    }
}
