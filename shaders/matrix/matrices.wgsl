// The device's cooperative matrices, M by M: operands of f16, sums of f32.
// Needs: the features f16 and cooperative matrices. Gives: Accumulator, Left, Right, M; Sums, Halves, WIDTH.
#if MATRIX16
alias Accumulator = coop_mat16x16<f32, C>;
alias Left = coop_mat16x16<f16, A>;
alias Right = coop_mat16x16<f16, B>;
const M = 16u;
#else
alias Accumulator = coop_mat8x8<f32, C>;
alias Left = coop_mat8x8<f16, A>;
alias Right = coop_mat8x8<f16, B>;
const M = 8u;
#endif

// Elements of workgroup memory that matrices are loaded from and stored to: WIDTH numbers. Metal's functions take
// pointers to numbers only.
#if SCALARS
alias Sums = f32;
alias Halves = f16;
const WIDTH = 1u;
#else
alias Sums = vec4f;
alias Halves = vec4<f16>;
const WIDTH = 4u;
#endif
