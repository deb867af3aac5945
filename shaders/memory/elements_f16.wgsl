// Elements of f16 in memory, for cooperative matrices. A thread moves eight at once, 16 bytes.
// Needs: the feature f16. Gives: Eight, InElements, OutElements, first_elements.

struct Eight {
    low: vec4<f16>,
    high: vec4<f16>,
}

#if ALIGNED
#if NO_ELEMENT_ACCESS
alias InElements = array<vec4<f16>>;
#else
alias InElements = array<vec4u>;
#endif
alias OutElements = array<vec4<f16>>;
#else
alias InElements = array<f16>;
alias OutElements = array<f16>;
#endif

// x with 0 for the elements from `count` on.
fn first_elements(x: Eight, count: u32) -> Eight {
    let e = vec4u(0u, 1u, 2u, 3u);
    let zero = vec4<f16>();
    return Eight(select(zero, x.low, e < vec4u(count)), select(zero, x.high, e + 4u < vec4u(count)));
}
