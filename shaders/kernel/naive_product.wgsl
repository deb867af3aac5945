// The product of a query and a key whose rows start at these elements. The forward and the backward pass have it from here, so that
// both round it alike: exp(score - lse) is as wrong as the two differ, and large scores may differ by a whole unit. So there is
// an fma, and no product and sum of which a compiler may make one.
fn query_times_key(query_start: u32, key_start: u32) -> f32 {
    var dot = vec4f();
    for (var d = 0u; d < HEAD_DIM; d += 4u) {
        let x = first_elements(unpack4(read_query(query_start, d, HEAD_DIM)), HEAD_DIM - d);
        dot = fma(x, unpack4(read_key(key_start, d, HEAD_DIM)), dot);
    }
    return sum4(dot);
}
