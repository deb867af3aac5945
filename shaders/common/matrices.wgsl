// The device's cooperative matrices, M by M: operands of f16, sums of f32.
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
