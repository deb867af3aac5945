// What the backward kernels for f32 and scaled bf16 share. A workgroup owns OWN rows of two tensors and walks over two more, STEP rows at a time:
// it owns K and V and takes steps of Q and dO, or it owns Q and dO and takes steps of K and V. One subgroup's registers would not hold
// both owned tensors, in parts, beside gradients. So subgroups work in pairs; both halves of a pair have the same MATRICES · M rows:
//
//     half 0 holds these rows of K (or Q) and computes the scores from steps of Q (or K);
//     half 1 holds these rows of V (or dO) and computes dP from steps of dO (or V).
//
// Needs: parts.wgsl, elements.wgsl, MATRICES, STEP, SUM_MATRICES. Gives: Owned, Step, owned_parts, store_step, products,
// unscaling_of, add_products, send_lane, receive_lane, send_sums.

const LANES = M * M / ELEMENTS;
const THREADS = SUBGROUPS * LANES;
const PAIRS = SUBGROUPS / 2u;
const OWN = PAIRS * MATRICES * M;
// Matrices across a step, and across the rows of all tensors: the shorter ones are filled up, so that both halves do alike.
const ACROSS_STEP = STEP / M;
const ACROSS_WIDER = (max(HEAD_DIM, HEAD_DIM_V) + M - 1u) / M;
// Rows in workgroup memory: how many vectors of four are there, and how far apart rows are. The two vectors between
// rows keep the rows of a matrix on different banks.
const W4 = ACROSS_WIDER * M / 4u;
const STRIDE = W4 + 2u;
const OWN_SIZE = OWN * STRIDE;
const STEP_SIZE = STEP * STRIDE;
// How many vectors each thread loads of a tensor's owned rows, and of its rows of a step.
const OWN_LOADS = (OWN * W4 + THREADS - 1u) / THREADS;
const STEP_LOADS = (STEP * W4 + THREADS - 1u) / THREADS;

// The parts of a step of the first tensor, then the parts of a step of the second. Before the loop: owned rows of both, a part at a time.
var<workgroup> tiles: array<vec4<f16>, 2u * max(PARTS * STEP_SIZE, OWN_SIZE)>;
// Matrices that one half of a pair sends to the second half. At the end: one matrix of each subgroup, to be read in whole rows.
var<workgroup> exchange: array<vec4f, PAIRS * max(MATRICES * ACROSS_STEP, 2u) * M * M / 4u>;

// Rows that may have scales of their own: owned rows of the first and the second tensor, then the step's rows of both.
const SIZED_ROWS = 2u * (OWN + STEP);

// x is for half 0, y for half 1: gives the number of this half.
fn of_half(x: vec2f, half: u32) -> f32 {
    return select(x.x, x.y, half == 1u);
}

// Each lane sends what it holds of a matrix; the lane of equal number in the pair's second subgroup receives it after a barrier.
fn send_lane(matrix: u32, lane: u32, x: Lane) {
    exchange[2u * matrix * LANES + lane] = vec4f(x[0], x[1], x[2], x[3]);
    exchange[(2u * matrix + 1u) * LANES + lane] = vec4f(x[4], x[5], x[6], x[7]);
}

fn receive_lane(matrix: u32, lane: u32) -> Lane {
    let x = exchange[2u * matrix * LANES + lane];
    let y = exchange[(2u * matrix + 1u) * LANES + lane];
    return Lane(x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w);
}

// Rows of both tensors that this thread moves.
struct Owned {
    first: array<Elements4, OWN_LOADS>,
    second: array<Elements4, OWN_LOADS>,
}

struct Step {
    first: array<Elements4, STEP_LOADS>,
    second: array<Elements4, STEP_LOADS>,
}

// Left operands of one tensor's owned rows.
alias Lefts = array<array<array<Left, PARTS>, ACROSS_WIDER>, MATRICES>;

// Gives a subgroup's left operands, and in `scales` the scales of both tensors; where elements are far apart, each row has a scale of its
// own instead. Elements past a tensor's dim are 0, so that they add nothing, whatever the step has there.
fn owned_parts(
    owned: Owned,
    first_dim: u32,
    second_dim: u32,
    thread: u32,
    subgroup: u32,
    lane: u32,
    scales: ptr<function, Scales>,
) -> Lefts {
    var first: array<vec4f, OWN_LOADS>;
    var second: array<vec4f, OWN_LOADS>;
    var first_sizes = vec2u();
    var second_sizes = vec2u();
    for (var n = 0u; n < OWN_LOADS; n++) {
        let d = 4u * ((thread + n * THREADS) % W4);
        first[n] = first_elements(unpack4(owned.first[n]), max(d, first_dim) - d);
        second[n] = first_elements(unpack4(owned.second[n]), max(d, second_dim) - d);
        first_sizes = max(first_sizes, sizes_of(first[n]));
        second_sizes = max(second_sizes, sizes_of(second[n]));
    }
    *scales = scales_of(first_sizes, second_sizes, subgroup, lane);
    // A loop of one trip at most: naga takes the condition for one that may differ between threads.
    for (var once = u32((*scales).apart); once > 0u; once--) {
        clear_sizes(0u, 2u * OWN, thread);
        workgroupBarrier();
        for (var n = 0u; n < OWN_LOADS; n++) {
            let row = (thread + n * THREADS) / W4;
            if row < OWN {
                add_size(row, first[n]);
                add_size(OWN + row, second[n]);
            }
        }
        workgroupBarrier();
    }
    for (var n = 0u; n < OWN_LOADS; n++) {
        let row = min((thread + n * THREADS) / W4, OWN - 1u);
        first[n] *= owned_scale(*scales, 0u, row);
        second[n] *= owned_scale(*scales, 1u, row);
    }
    var lefts: Lefts;
    let own_at = (subgroup / PAIRS * OWN + subgroup % PAIRS * MATRICES * M) * STRIDE;
    for (var part = 0u; part < PARTS; part++) {
        for (var n = 0u; n < OWN_LOADS; n++) {
            let t = thread + n * THREADS;
            let x = part4_of(first[n], part);
            let y = part4_of(second[n], part);
            first[n] -= x;
            second[n] -= y;
            if t < OWN * W4 {
                let place = t / W4 * STRIDE + t % W4;
                tiles[place] = vec4<f16>(x);
                tiles[OWN_SIZE + place] = vec4<f16>(y);
            }
        }
        workgroupBarrier();
        for (var r = 0u; r < MATRICES; r++) {
            for (var d = 0u; d < ACROSS_WIDER; d++) {
                let place = own_at + r * M * STRIDE + d * M / 4u;
                lefts[r][d][part] = coopLoadT<Left>(&tiles[place], STRIDE);
            }
        }
        workgroupBarrier();
    }
    return lefts;
}

// Gives the scale of an owned row of the first or of the second tensor.
fn owned_scale(scales: Scales, tensor: u32, row: u32) -> f32 {
    return select(of_half(scales.tile, tensor), row_scale(tensor * OWN + row), scales.apart);
}

// Gives the scale of a step's row of the first or of the second tensor, where rows have scales of their own.
fn step_scale(tensor: u32, row: u32) -> f32 {
    return row_scale(2u * OWN + tensor * STEP + row);
}

// Stores a step in workgroup memory; returns its scales. They are `apart` if the step's elements are far apart, or the owned ones: then
// each row has a scale of its own. No subgroup may still read the step before.
fn store_step(step: Step, owned: Scales, thread: u32, subgroup: u32, lane: u32) -> Scales {
    var first_sizes = vec2u();
    var second_sizes = vec2u();
    for (var n = 0u; n < STEP_LOADS; n++) {
        first_sizes = max(first_sizes, sizes_of(unpack4(step.first[n])));
        second_sizes = max(second_sizes, sizes_of(unpack4(step.second[n])));
    }
    var scales = scales_of(first_sizes, second_sizes, subgroup, lane);
    scales.apart = scales.apart || owned.apart;
    if !scales.apart {
        for (var n = 0u; n < STEP_LOADS; n++) {
            let t = thread + n * THREADS;
            if t < STEP * W4 {
                let place = t / W4 * STRIDE + t % W4;
                store_parts(place, STEP_SIZE, unpack4(step.first[n]) * scales.tile.x);
                store_parts(PARTS * STEP_SIZE + place, STEP_SIZE, unpack4(step.second[n]) * scales.tile.y);
            }
        }
    }
    for (var once = u32(scales.apart); once > 0u; once--) {
        clear_sizes(2u * OWN, 2u * STEP, thread);
        workgroupBarrier();
        for (var n = 0u; n < STEP_LOADS; n++) {
            let row = (thread + n * THREADS) / W4;
            if row < STEP {
                add_size(2u * OWN + row, unpack4(step.first[n]));
                add_size(2u * OWN + STEP + row, unpack4(step.second[n]));
            }
        }
        workgroupBarrier();
        for (var n = 0u; n < STEP_LOADS; n++) {
            let t = thread + n * THREADS;
            if t < STEP * W4 {
                let place = t / W4 * STRIDE + t % W4;
                store_parts(place, STEP_SIZE, unpack4(step.first[n]) * step_scale(0u, t / W4));
                store_parts(PARTS * STEP_SIZE + place, STEP_SIZE, unpack4(step.second[n]) * step_scale(1u, t / W4));
            }
        }
    }
    return scales;
}

// Scores of a subgroup; later its probabilities or score gradients.
alias Scores = array<array<Lane, ACROSS_STEP>, MATRICES>;

// The scale of what a subgroup's lanes hold, to be multiplied with a tile of scale `other`: at most 2^126 / other, so that
// one number takes both scales back.
fn scale_of_lanes(x: Scores, other: f32) -> f32 {
    var size = 0.0;
    for (var r = 0u; r < MATRICES; r++) {
        for (var c = 0u; c < ACROSS_STEP; c++) {
            for (var e = 0u; e < ELEMENTS; e++) {
                size = max(size, abs(x[r][c][e]));
            }
        }
    }
    let scale = scale_for(subgroupMax(bitcast<u32>(size)));
    return bitcast<f32>(min(bitcast<u32>(scale), (380u << 23u) - bitcast<u32>(other)));
}

// Where rows have scales of their own: divides the products of a half by the scales of their rows. Half 0, whose products become scores,
// multiplies them by `size` too. No result is infinite, since a masked one is later multiplied by a probability of 0.
fn take_scales_back(x: ptr<function, Scores>, owned: Scales, size: f32, pair: u32, half: u32, lane: u32) {
    for (var r = 0u; r < MATRICES; r++) {
        for (var c = 0u; c < ACROSS_STEP; c++) {
            for (var e = 0u; e < ELEMENTS; e++) {
                let a = owned_scale(owned, half, (pair * MATRICES + r) * M + row_of(lane, e));
                let b = step_scale(half, c * M + column_of(lane, e));
                var y = (*x)[r][c][e];
                if half == 0u {
                    y *= unscaled(size, a, b);
                } else {
                    y = unscaled(y, a, b);
                }
                (*x)[r][c][e] = clamp(y, -NO_KEYS, NO_KEYS);
            }
        }
    }
}

// What undoes the scales of the owned rows and of the step.
struct Unscaling {
    // Products times both numbers are unscaled: q·k in half 0, dP in half 1.
    halves: vec2f,
    // Unless SHAPED, products of half 0 times this are scores.
    factor: f32,
}

// Gives what undoes the scales of a step. Where rows have scales of their own, it undoes them in x itself, and gives factors of 1.
fn unscaling_of(x: ptr<function, Scores>, owned: Scales, step: Scales, pair: u32, half: u32, lane: u32) -> Unscaling {
    let factor = unscaled(score_unit(), owned.tile.x, step.tile.x);
    var unscaling = Unscaling(inverse_halves(of_half(owned.tile, half), of_half(step.tile, half)), factor);
    if step.apart {
        take_scales_back(x, owned, score_unit(), pair, half, lane);
        unscaling = Unscaling(vec2f(1.0), 1.0);
    }
    return unscaling;
}

// One number for each row that a lane holds elements of.
alias RowFactors = array<array<f32, LANE_ROWS>, MATRICES>;
alias RowExponents = array<array<i32, LANE_ROWS>, MATRICES>;

// Multiplies each row by the power of two that brings its largest element to between 2^14 and 2^15, but in all by at most
// 2^largest_exponent.
// The exponents of these powers are added to `exponents`.
fn scale_rows(x: ptr<function, Scores>, largest_exponent: i32, exponents: ptr<function, RowExponents>) {
    for (var r = 0u; r < MATRICES; r++) {
        var size = array<f32, LANE_ROWS>();
        for (var c = 0u; c < ACROSS_STEP; c++) {
            for (var e = 0u; e < ELEMENTS; e++) {
                size[held_row(e)] = max(size[held_row(e)], abs((*x)[r][c][e]));
            }
        }
        for (var h = 0u; h < LANE_ROWS; h++) {
            let scale = scale_for(bitcast<u32>(row_max(size[h])));
            let exponent = min(i32(bitcast<u32>(scale) >> 23u) - 127, largest_exponent - (*exponents)[r][h]);
            size[h] = power_of_two(exponent);
            (*exponents)[r][h] += exponent;
        }
        for (var c = 0u; c < ACROSS_STEP; c++) {
            for (var e = 0u; e < ELEMENTS; e++) {
                (*x)[r][c][e] *= size[held_row(e)];
            }
        }
    }
}

// Where rows have scales of their own. Divides x by the scales of the step's rows that it will be multiplied with, then multiplies each
// row of x by a scale. Returns the factors that undo this in the rows of the product.
fn over_step_scales(x: ptr<function, Scores>, tensor: u32, tile_scale: f32, lane: u32) -> RowFactors {
    var exponents = RowExponents();
    scale_rows(x, 126, &exponents);
    // A power of two that keeps the quotients from falling below the smallest numbers of f32.
    let lift = min(tile_scale * 0x1p100, 0x1p126);
    for (var r = 0u; r < MATRICES; r++) {
        for (var c = 0u; c < ACROSS_STEP; c++) {
            for (var e = 0u; e < ELEMENTS; e++) {
                (*x)[r][c][e] *= lift * inverse(step_scale(tensor, c * M + column_of(lane, e)));
            }
        }
    }
    let lifted = i32(bitcast<u32>(lift) >> 23u) - 127;
    scale_rows(x, 126 - lifted, &exponents);
    var unscale = RowFactors();
    for (var r = 0u; r < MATRICES; r++) {
        for (var h = 0u; h < LANE_ROWS; h++) {
            unscale[r][h] = power_of_two(-lifted - exponents[r][h]);
        }
    }
    return unscale;
}

// The gradients of a subgroup: SUM_MATRICES matrices across their columns.
alias Gradients = array<array<Lane, SUM_MATRICES>, MATRICES>;

// A subgroup's owned rows times the step's rows, transposed. Both are scaled, so the products are scaled too.
fn products(lefts: ptr<function, Lefts>, half: u32) -> Scores {
    var x: Scores;
    for (var c = 0u; c < ACROSS_STEP; c++) {
        var sum = array<Accumulator, MATRICES>();
        for (var r = 0u; r < MATRICES; r++) {
            sum[r] = Accumulator();
        }
        for (var n = 0u; n < PARTS; n++) {
            for (var d = 0u; d < ACROSS_WIDER; d++) {
                for (var b = 0u; b + n < PARTS; b++) {
                    let place = (half * PARTS + b) * STEP_SIZE + c * M * STRIDE + d * M / 4u;
                    let right = coopLoad<Right>(&tiles[place], STRIDE);
                    for (var r = 0u; r < MATRICES; r++) {
                        sum[r] = coopMultiplyAdd((*lefts)[r][d][PARTS - 1u - n - b], right, sum[r]);
                    }
                }
            }
        }
        for (var r = 0u; r < MATRICES; r++) {
            x[r][c] = elements_of(sum[r]);
        }
    }
    return x;
}

// sums += `given` times the step's rows of a tensor (0: the first, 1: the second); its columns begin at matrix `first`.
fn add_products(sums: ptr<function, Gradients>, given: Scores, tensor: u32, scales: Scales, first: u32, lane: u32) {
    var x = given;
    let tile_scale = of_half(scales.tile, tensor);
    var unscale = RowFactors();
    if scales.apart {
        unscale = over_step_scales(&x, tensor, tile_scale, lane);
    } else {
        let x_scale = scale_of_lanes(x, tile_scale);
        for (var r = 0u; r < MATRICES; r++) {
            for (var c = 0u; c < ACROSS_STEP; c++) {
                for (var e = 0u; e < ELEMENTS; e++) {
                    x[r][c][e] *= x_scale;
                }
            }
            for (var h = 0u; h < LANE_ROWS; h++) {
                unscale[r][h] = inverse(x_scale) * inverse(tile_scale);
            }
        }
    }
    var left: array<array<array<Left, PARTS>, ACROSS_STEP>, MATRICES>;
    for (var r = 0u; r < MATRICES; r++) {
        for (var c = 0u; c < ACROSS_STEP; c++) {
            left[r][c] = left_parts(x[r][c]);
        }
    }
    for (var d = 0u; d < SUM_MATRICES; d++) {
        var sum = array<Accumulator, MATRICES>();
        for (var r = 0u; r < MATRICES; r++) {
            sum[r] = Accumulator();
        }
        for (var n = 0u; n < PARTS; n++) {
            for (var c = 0u; c < ACROSS_STEP; c++) {
                for (var b = 0u; b + n < PARTS; b++) {
                    let column = min(first + d, ACROSS_WIDER - 1u) * M / 4u;
                    let place = (tensor * PARTS + b) * STEP_SIZE + c * M * STRIDE + column;
                    let right = coopLoadT<Right>(&tiles[place], STRIDE);
                    for (var r = 0u; r < MATRICES; r++) {
                        sum[r] = coopMultiplyAdd(left[r][c][PARTS - 1u - n - b], right, sum[r]);
                    }
                }
            }
        }
        for (var r = 0u; r < MATRICES; r++) {
            let y = elements_of(sum[r]);
            for (var e = 0u; e < ELEMENTS; e++) {
                (*sums)[r][d][e] = fma(y[e], unscale[r][held_row(e)], (*sums)[r][d][e]);
            }
        }
    }
}

// Sends matrix n of a subgroup's sums to workgroup memory, from where lanes read whole rows of it.
fn send_sums(sums: ptr<function, Gradients>, n: u32, subgroup: u32, lane: u32) {
    // A driver that does not unroll the loop over n, with its barriers, would have sums in memory if n were their index.
    for (var r = 0u; r < MATRICES; r++) {
        for (var d = 0u; d < SUM_MATRICES; d++) {
            if r * SUM_MATRICES + d == n {
                for (var e = 0u; e < ELEMENTS; e++) {
                    let t = subgroup * M * M + row_of(lane, e) * M + column_of(lane, e);
                    exchange[t / 4u][t % 4u] = (*sums)[r][d][e];
                }
            }
        }
    }
}
