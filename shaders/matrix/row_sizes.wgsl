// The sizes of the elements that a thread reads of `rows` rows of $tensor from row `first` on. All threads together read all of them.
// Needs: sizes.wgsl, THREADS, read_$tensor. Gives: row_sizes_$tensor.

fn row_sizes_$tensor(at: Sequence, first: u32, rows: u32, dim: u32, thread: u32) -> vec2u {
    let vectors = (dim + 3u) / 4u;
    var sizes = vec2u();
    for (var t = thread; t < rows * vectors; t += THREADS) {
        let d = 4u * (t % vectors);
        let x = unpack4(read_$tensor($tensor_row(at, first + t / vectors), d, dim));
        sizes = max(sizes, sizes_of(first_elements(x, dim - d)));
    }
    return sizes;
}
