// How a row ends.
// Needs: softmax.wgsl, sequence.wgsl, given.wgsl. Gives: Row, finish_row.

struct Row {
    // What the sum of p V is multiplied by: 1 / the sum of p, times dropout's scale, and 0 for a row that sees no key.
    inverse: f32,
    // lse = m + ln(sum of p); of a row that sees no key -infinity. As bits, since WGSL may assume that infinity does not occur.
    lse: u32,
}

// Ends a row. `sum` is the sum of exp(score - m) over its keys, before dropout. These exponentials were the weights of the sum of V.
fn finish_row(at: Sequence, m: f32, sum: f32, is_empty: bool) -> Row {
#if SINKS
    // The sink is one more score in the denominator, of no key.
    let sink = sink_of(at);
    if sink == MASKED {
        return row_of_keys(m, sum, is_empty);
    }
    let maximum = select(max(m, sink), sink, is_empty);
    let of_keys = select(exp_difference(m, maximum), 0.0, is_empty);
    let all = sum * of_keys + exp_difference(sink, maximum);
    return Row(of_sum(of_keys / all), bitcast<u32>(maximum + log(all)));
#else
    return row_of_keys(m, sum, is_empty);
#endif
}

fn row_of_keys(m: f32, sum: f32, is_empty: bool) -> Row {
    let some = max(sum, 1.0e-30);
    return Row(select(of_sum(1.0 / some), 0.0, is_empty), select(bitcast<u32>(m + log(some)), 0xff800000u, is_empty));
}

// What is kept of p V counts for what dropout drops of it. `inverse` is 1 / the sum of all p.
fn of_sum(inverse: f32) -> f32 {
#if DROPOUT
    return inverse * problem.dropout_scale;
#else
    return inverse;
#endif
}
