// All that a kernel may ask about attention: whose rows these are and where they lie, which tiles are visited, what a score is,
// whether it counts, and how a row ends. No kernel knows a mask or a shape of scores by name.
// Needs: with LENGTHS_IN_ROWS, memory/row_stats.wgsl. Gives: all that the files below give.
#include "attention/softmax.wgsl"
#include "attention/sequence.wgsl"
#include "attention/probe.wgsl"
#include "attention/given.wgsl"
#include "attention/mods.wgsl"
#include "attention/score.wgsl"
#include "attention/blocks.wgsl"
#include "attention/keep.wgsl"
#include "attention/tiles.wgsl"
#include "attention/finish.wgsl"
#if DROPOUT
#include "attention/dropout.wgsl"
#endif
