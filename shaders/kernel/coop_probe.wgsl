// Which element of a matrix does each lane hold? Loads matrices whose elements are their own indices, row · SIZE + column,
// and writes what each lane finds: held[role][lane][element], the roles being C, A and B.
//
// src/matrices/ writes what comes before this: SIZE and LANES, the types MatrixC, MatrixA and MatrixB, and
// write_c(m, at), write_a and write_b, which write a lane's elements of m from held[at] on. One subgroup runs it.
@group(0) @binding(0) var<storage, read_write> indices_f32: array<f32>;
@group(0) @binding(1) var<storage, read_write> indices_f16: array<f16>;
@group(0) @binding(2) var<storage, read_write> held: array<u32>;

@compute @workgroup_size(LANES)
fn main(@builtin(subgroup_invocation_id) lane: u32) {
    let at = lane * (SIZE * SIZE / LANES);
    write_c(coopLoadT<MatrixC>(&indices_f32[0], SIZE), at);
    write_a(coopLoadT<MatrixA>(&indices_f16[0], SIZE), at + SIZE * SIZE);
    write_b(coopLoadT<MatrixB>(&indices_f16[0], SIZE), at + 2u * SIZE * SIZE);
}
