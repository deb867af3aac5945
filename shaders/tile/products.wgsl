// The two products of the tiled backward kernels, on f32 operands in workgroup memory. A workgroup owns OWN rows of one tensor and walks
// over the rows of another, STEP at a time. Threads form a grid of THREADS_Y x THREADS_X. Thread (ty, tx) has, for owned rows ty,
// ty + THREADS_Y, ... : the scores with rows tx·TC .. tx·TC + TC of the step, and the result's columns 4(tx + THREADS_X u) .. + 4.
// Needs: OWN, STEP, BLOCK, CHUNK4, THREADS_X, THREADS_Y, HEAD_DIM, HEAD_DIM_V. Gives: tiles, Scores, add_scores, store_scores.

const THREADS = THREADS_X * THREADS_Y;
const TR = OWN / THREADS_Y;
const TC4 = STEP / THREADS_X / 4u;
const TC = 4u * TC4;
// Vectors of four columns that a thread has of a result with the head dim of K, and of V.
const TK = (HEAD_DIM + 4u * THREADS_X - 1u) / (4u * THREADS_X);
const TV = (HEAD_DIM_V + 4u * THREADS_X - 1u) / (4u * THREADS_X);
// Row lengths in workgroup memory, in vectors. An odd length spreads a column over all banks.
const CHUNK_STRIDE = CHUNK4 | 1u;
// Loads a thread does of a chunk.
const OWN_LOADS = (OWN * CHUNK4 + THREADS - 1u) / THREADS;
const STEP_LOADS = (STEP * CHUNK4 + THREADS - 1u) / THREADS;
const P_STRIDE = (STEP / 4u) | 1u;
// For the scores: CHUNK columns of the owned rows, and of the step's. For the results: OWN x STEP probabilities or score
// gradients, and BLOCK rows of the step.
const STEP_AT = OWN * CHUNK_STRIDE;
const BLOCK_AT = OWN * P_STRIDE;
var<workgroup> tiles: array<vec4f, max(STEP_AT + STEP * CHUNK_STRIDE, BLOCK_AT + BLOCK * max(TK, TV) * THREADS_X)>;

alias Scores = array<array<vec4f, TC4>, TR>;

// scores += the owned rows times the step's, transposed, over the columns that are there.
fn add_scores(scores: ptr<function, Scores>, ty: u32, tx: u32) {
    // Written out if the tile says so: loads of the next vectors are then among the products of these.
#unroll
    for (var d = 0u; d < CHUNK4; d++) {
        var b = array<vec4f, TC>();
        for (var c = 0u; c < TC; c++) {
            b[c] = tiles[STEP_AT + (c * THREADS_X + tx) * CHUNK_STRIDE + d];
        }
        for (var r = 0u; r < TR; r++) {
            let a = tiles[(r * THREADS_Y + ty) * CHUNK_STRIDE + d];
            for (var c = 0u; c < TC4; c++) {
                (*scores)[r][c] = dot4(a, b[4u * c], b[4u * c + 1u], b[4u * c + 2u], b[4u * c + 3u], (*scores)[r][c]);
            }
        }
    }
}

// What the owned rows have of each row of the step, to workgroup memory.
fn store_scores(scores: Scores, ty: u32, tx: u32) {
    for (var r = 0u; r < TR; r++) {
        for (var c = 0u; c < TC4; c++) {
            tiles[(r * THREADS_Y + ty) * P_STRIDE + tx * TC4 + c] = scores[r][c];
        }
    }
}
