// Columns in workgroup memory, CHUNK of them at a time, as vectors of four rows. The place of vector n in a column that has
// `count` of them; `column4` is the number of the column, over 4. Threads that load neighbouring columns of the same rows store
// them at the same time, and would all meet in one bank; so each four columns have their vectors in another order.
fn place(n: u32, column4: u32, count: u32) -> u32 {
    const SPREAD = max(8u / CHUNK4, 1u);
    // A number below the largest power of two that divides count.
    let most = min(count & (~count + 1u), 8u) - 1u;
    return n ^ ((column4 * SPREAD) & most);
}
