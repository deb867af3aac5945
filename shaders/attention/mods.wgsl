// Where a score is, as the user's functions are told. They are called mods_score and mods_keep; src/kernel/pass.rs puts their text behind
// the module's.
// Needs: sequence.wgsl, the text of src/mods/. Gives: with SCORE_MOD or MASK_MOD mod_position.

#if MODS
// The nearest that is valid: kernels ask about queries and keys past the ends, too, and nobody but they should meet one.
fn mod_position(at: Sequence, i: i32, j: i32) -> mods_Position {
    let query = u32(max(min(i, at.queries - 1), 0));
    let key = u32(max(min(j, at.keys - 1), 0));
    return mods_Position(at.batch, at.head, query, key, u32(at.queries), u32(at.keys), at.keys - at.queries);
}
#endif
