// Where the elements of a matrix lie. Each bit of a row or column number is a bit of the lane's number (sources 0 to 7)
// or of the element's (sources 8 and up), as the device was found to have it.
fn source_bit(lane: u32, e: u32, source: u32) -> u32 {
    if source < 8u {
        return (lane >> source) & 1u;
    }
    return (e >> (source - 8u)) & 1u;
}

fn row_of(lane: u32, e: u32) -> u32 {
    return source_bit(lane, e, ROW_BIT_0) + 2u * source_bit(lane, e, ROW_BIT_1) + 4u * source_bit(lane, e, ROW_BIT_2)
#if MATRIX16
        + 8u * source_bit(lane, e, ROW_BIT_3)
#endif
        ;
}

fn column_of(lane: u32, e: u32) -> u32 {
    return source_bit(lane, e, COLUMN_BIT_0) + 2u * source_bit(lane, e, COLUMN_BIT_1) + 4u * source_bit(lane, e, COLUMN_BIT_2)
#if MATRIX16
        + 8u * source_bit(lane, e, COLUMN_BIT_3)
#endif
        ;
}

// A lane holds elements of LANE_ROWS rows; this numbers them by the element's bits that are row bits.
fn held_row(e: u32) -> u32 {
    var held = 0u;
    var weight = 1u;
    for (var k = 0u; k < 3u; k++) {
        if ((ELEMENT_ROW_BITS >> k) & 1u) == 1u {
            held += weight * ((e >> k) & 1u);
            weight *= 2u;
        }
    }
    return held;
}

// The same for columns, of which a lane holds LANE_COLUMNS.
fn held_column(e: u32) -> u32 {
    var held = 0u;
    var weight = 1u;
    for (var k = 0u; k < 3u; k++) {
        if ((ELEMENT_ROW_BITS >> k) & 1u) == 0u {
            held += weight * ((e >> k) & 1u);
            weight *= 2u;
        }
    }
    return held;
}

// Over the lanes that share a row: those that differ in a bit that is a column bit.
fn row_max(x: f32) -> f32 {
    var most = x;
    for (var k = 0u; k < 5u; k++) {
        if ((LANE_COLUMN_BITS >> k) & 1u) == 1u {
            most = max(most, subgroupShuffleXor(most, 1u << k));
        }
    }
    return most;
}

fn row_sum(x: f32) -> f32 {
    var sum = x;
    for (var k = 0u; k < 5u; k++) {
        if ((LANE_COLUMN_BITS >> k) & 1u) == 1u {
            sum += subgroupShuffleXor(sum, 1u << k);
        }
    }
    return sum;
}
