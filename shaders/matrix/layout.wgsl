// Where the elements of a matrix lie.
// Needs: ROW_BIT_n, COLUMN_BIT_n, ELEMENT_ROW_BITS, LANE_COLUMN_BITS, as the device was found to have them (src/matrices/).
// Gives: row_of, row_bit_0, row_bit_3, row_next, row_lane; column_of, column_bit_0, column_bit_3, column_next, column_lane; held_row,
// held_column, row_max, row_sum.
//
// Each bit of a row or column number is a bit of the lane's number (sources 0 to 7) or of the element's number (sources 8 and up).

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

// Bits 0 and 3 of rows and columns. Matrices of 8 have no bit 3.
fn row_bit_0(lane: u32, e: u32) -> u32 {
    return source_bit(lane, e, ROW_BIT_0);
}

fn column_bit_0(lane: u32, e: u32) -> u32 {
    return source_bit(lane, e, COLUMN_BIT_0);
}

#if MATRIX16
fn row_bit_3(lane: u32, e: u32) -> u32 {
    return source_bit(lane, e, ROW_BIT_3);
}

fn column_bit_3(lane: u32, e: u32) -> u32 {
    return source_bit(lane, e, COLUMN_BIT_3);
}
#endif

// If bit 0 is a bit of the element's number, that bit: such an element is followed by one in the next row, or column, that the lane holds
// too. Else 0.
const row_next = (ROW_BIT_0 / 8u) << (max(ROW_BIT_0, 8u) - 8u);
const column_next = (COLUMN_BIT_0 / 8u) << (max(COLUMN_BIT_0, 8u) - 8u);
// If bit 0 is a bit of the lane's number, that bit: what tells the lane of the next row, or column.
const row_lane = 1u << (ROW_BIT_0 % 8u);
const column_lane = 1u << (COLUMN_BIT_0 % 8u);

// The bits of the element's number that `bits` has, as a number of their own. Without a loop: an index of an array that
// the driver knows from the start, so that the array is in registers.
fn gathered(e: u32, bits: u32) -> u32 {
    let b0 = bits & 1u;
    let b1 = (bits >> 1u) & 1u;
    let b2 = (bits >> 2u) & 1u;
    return (e & b0) + (((e >> 1u) & b1) << b0) + (((e >> 2u) & b2) << (b0 + b1));
}

// A lane holds elements of LANE_ROWS rows; this numbers them by the element's bits that are row bits.
fn held_row(e: u32) -> u32 {
    return gathered(e, ELEMENT_ROW_BITS);
}

// A lane holds elements of LANE_COLUMNS columns; this numbers them by the element's bits that are column bits.
fn held_column(e: u32) -> u32 {
    return gathered(e, 7u ^ ELEMENT_ROW_BITS);
}

// The maximum over the lanes that share a row. Numbers of such lanes differ only in bits that are column bits.
fn row_max(x: f32) -> f32 {
    var maximum = x;
    for (var k = 0u; k < 5u; k++) {
        if ((LANE_COLUMN_BITS >> k) & 1u) == 1u {
            maximum = max(maximum, subgroupShuffleXor(maximum, 1u << k));
        }
    }
    return maximum;
}

// The sum over the lanes that share a row.
fn row_sum(x: f32) -> f32 {
    var sum = x;
    for (var k = 0u; k < 5u; k++) {
        if ((LANE_COLUMN_BITS >> k) & 1u) == 1u {
            sum += subgroupShuffleXor(sum, 1u << k);
        }
    }
    return sum;
}
