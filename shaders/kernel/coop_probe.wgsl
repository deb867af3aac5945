// Which element of a matrix does each lane hold, and how are numbers rounded that become operands?
//
// Loads matrices whose elements are their own indices, row · SIZE + column, and writes what each lane finds: held[role][lane][element], the
// roles being C, A and B. Then it loads numbers as an accumulator, writes what each lane finds (role 3), makes a left operand of them and
// writes its product with 1, the identity, which is what they became (role 4). At the same places of `halves`, behind the indices and the
// identity, it stores the numbers themselves, converted.
//
// src/matrices/probe.rs writes what comes before this: SIZE and LANES, the types MatrixC, MatrixA and MatrixB; write_c(m, at), write_a
// and write_b, which write a lane's indices from held[at] on; write_bits(m, at), which writes the bits of its elements; left_of(m), a left operand
// of an accumulator's elements; and convert(m, at), which stores them to halves[at]. One subgroup runs it. On bf16 the f16 are bf16.
@group(0) @binding(0) var<storage, read_write> numbers: array<f32>;
@group(0) @binding(1) var<storage, read_write> halves: array<f16>;
@group(0) @binding(2) var<storage, read_write> held: array<u32>;

@compute @workgroup_size(LANES)
fn main(@builtin(subgroup_invocation_id) lane: u32) {
    let own = lane * (SIZE * SIZE / LANES);
    write_c(coopLoadT<MatrixC>(&numbers[0], SIZE), own);
    write_a(coopLoadT<MatrixA>(&halves[0], SIZE), own + SIZE * SIZE);
    write_b(coopLoadT<MatrixB>(&halves[0], SIZE), own + 2u * SIZE * SIZE);
    let m = coopLoadT<MatrixC>(&numbers[SIZE * SIZE], SIZE);
    write_bits(m, own + 3u * SIZE * SIZE);
    let identity = coopLoadT<MatrixB>(&halves[SIZE * SIZE], SIZE);
    write_bits(coopMultiplyAdd(left_of(m), identity, MatrixC()), own + 4u * SIZE * SIZE);
    convert(m, own + 2u * SIZE * SIZE);
}
