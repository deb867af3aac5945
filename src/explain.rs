//! What a plan does, in words, and how many bytes it moves.

use std::fmt::{Display, Formatter, Result};

use crate::dropout;
use crate::kernel::{Rounds, forward_tile};
use crate::names::Kernel;
use crate::plan::Plan;
use crate::problem::{Causal, Problem, Tensor};
use crate::schedule::Schedule;

impl Display for Plan {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let p = &self.problem;
        let s = &p.shape;
        writeln!(
            f,
            "{} forward: batch {}, {} query heads on {} key-value heads, {} queries, {} keys, head dim {} and {}",
            p.element_type, s.batch, s.heads_q, s.heads_kv, s.seqlen_q, s.seqlen_k, s.head_dim, s.head_dim_v
        )?;
        let asked = [("masks", masks(p)), ("scores", scores(p))];
        for (name, all) in asked.iter().filter(|(_, all)| !all.is_empty()) {
            writeln!(f, "{name}: {}", all.join(", "))?;
        }
        if let Some(probability) = p.dropout_in_use() {
            let kept = dropout::kept_of_256(probability);
            writeln!(
                f,
                "dropout: {probability}; {kept} of 256 probabilities are kept, {:.4} of them, and divided by {}",
                f64::from(kept) / 256.0,
                1.0 - probability
            )?;
        }
        writeln!(f, "kernel: {} ({})", self.forward.kernel, self.forward.reason)?;
        if let Some((form, why)) = &self.forward.coop_form {
            writeln!(f, "form: {form} ({why})")?;
        }
        if let Some(t) = self.tile {
            writeln!(
                f,
                "tile: {} queries by {} keys, {} threads; Q and K by {} columns, probabilities and V by {} keys",
                t.rows,
                t.keys,
                t.threads(),
                t.chunk,
                t.value_keys
            )?;
        }
        if let (None, Some((rows, keys))) = (self.tile, self.rows_and_keys) {
            // Rows of a tile of the decode kernel are of several heads.
            let what = if self.splits.is_some() { "rows (queries of the heads that share keys)" } else { "queries" };
            writeln!(f, "tile: {rows} {what} by {keys} keys")?;
        }
        if let Some(splits) = self.splits {
            writeln!(f, "splits of the keys: {splits}")?;
        }
        if let Some(blocks) = p.blocks {
            let unmasked = if blocks.full_unmasked { "; full ones are not asked about masks" } else { "" };
            writeln!(f, "block lists: blocks of {} queries by {} keys{unmasked}", blocks.queries, blocks.keys)?;
        }
        let aligned = p.is_aligned(&Tensor::FORWARD, self.forward.vector);
        writeln!(f, "access: {}", if aligned { "whole vectors" } else { "element by element" })?;
        writeln!(f, "{}", self.forward)?;
        let stored = if self.kernel() == Kernel::Naive { "kept in the workspace" } else { "kept in no buffer" };
        write!(
            f,
            "tensors: {}; all scores: {}, {stored}",
            Bytes(p.forward_bytes()),
            Bytes(saturated(4 * s.rows() as u128 * s.seqlen_k as u128))
        )?;
        if let Some(backward) = &self.backward {
            write!(f, "\nbackward kernel: {} ({})", backward.kernel, backward.reason)?;
            if let Some((form, why)) = &backward.coop_form {
                write!(f, "\nbackward form: {form} ({why})")?;
            }
            if let Some(Rounds { block_keys, block_rows, count }) = backward.rounds {
                let blocks = format!("{block_rows} queries by {block_keys} keys");
                write!(f, "\nbackward gradients: all at once, in {count} dispatches, in blocks of {blocks}")?;
            }
            write!(f, "\n{backward}")?;
        }
        Ok(())
    }
}

/// What decides which scores count, besides block lists.
fn masks(p: &Problem) -> Vec<String> {
    let side = |width: Option<u32>| width.map_or("all".into(), |n| n.to_string());
    let window = p.window_left.is_some() || p.window_right.is_some();
    [
        p.causal.map(|causal| match causal {
            Causal::TopLeft => "causal (top-left)".into(),
            Causal::BottomRight => "causal (bottom-right)".into(),
        }),
        window.then(|| format!("window of {} keys before and {} after", side(p.window_left), side(p.window_right))),
        p.seqlens_q.then(|| "lengths of queries".into()),
        p.seqlens_k.then(|| "lengths of keys".into()),
        p.mask.map(|mask| format!("boolean {:?}", mask.sizes_in(&p.shape))),
        p.has_mask_mod().then(|| "mask_mod".into()),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// What scores are besides scale · q·k, and what joins their softmax.
fn scores(p: &Problem) -> Vec<String> {
    [
        p.softcap.map(|softcap| format!("softcap {softcap}")),
        p.has_score_mod().then(|| "score_mod".into()),
        p.bias.map(|bias| format!("bias {} {:?}", bias.element_type, bias.layout.sizes_in(&p.shape))),
        p.alibi.map(|_| "ALiBi".into()),
        p.sinks.then(|| "sinks".into()),
    ]
    .into_iter()
    .flatten()
    .collect()
}

impl Display for Schedule {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        writeln!(f, "workgroup memory: {}", Bytes(self.workgroup_bytes as u64))?;
        let workgroups: u64 =
            self.launches.iter().map(|l| l.workgroups.iter().map(|&n| n as u64).product::<u64>()).sum();
        writeln!(
            f,
            "workgroups: {workgroups}, dispatches: {}, parts that the problem was split into: {}",
            self.launches.len(),
            self.parts
        )?;
        write!(f, "workspace: {}", Bytes(self.workspace_bytes))
    }
}

struct Bytes(u64);

impl Display for Bytes {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let x = self.0 as f64;
        match self.0 {
            0..1024 => write!(f, "{} bytes", self.0),
            1024..1_048_576 => write!(f, "{:.1} KiB", x / 1024.0),
            1_048_576..1_073_741_824 => write!(f, "{:.1} MiB", x / 1_048_576.0),
            _ => write!(f, "{:.2} GiB", x / 1_073_741_824.0),
        }
    }
}

impl Plan {
    /// Bytes that the kernel asks of device memory or its caches, which is not to be compared with
    /// [`Plan::materialized_bytes`], for what caches serve is counted here and not there: inputs each time that they are
    /// loaded, outputs each time that they are stored or, being sums in the making, loaded, and scores where they are stored.
    /// `u64::MAX` if they are more.
    pub fn bytes_moved(&self) -> u64 {
        match self.rows_and_keys {
            Some((rows, _)) if self.kernel() == Kernel::Decode => saturated(self.decode_bytes_moved(rows)),
            Some((rows, keys)) => saturated(self.tile_bytes_moved(rows, keys)),
            None => self.materialized_bytes(),
        }
    }

    /// K and V once for each tile of rows, q for each split, and the splits' results, written and read.
    fn decode_bytes_moved(&self, rows: u32) -> u128 {
        let s = &self.problem.shape;
        let splits = self.splits.unwrap_or(1) as u128;
        let tiles = (s.group() as u64 * s.seqlen_q as u64).div_ceil(rows as u64) as u128;
        let keys = s.batch as u128 * s.heads_kv as u128 * tiles * self.problem.keys_in_sight() as u128;
        let elements = keys * (s.head_dim + s.head_dim_v) as u128
            + s.rows() as u128 * (splits * s.head_dim as u128 + s.head_dim_v as u128);
        let workspace = splits * s.rows() as u128 * (16 * s.head_dim_v.div_ceil(4) as u128 + 8);
        elements * self.problem.element_type.bytes() as u128 + 2 * workspace + self.lse_bytes()
    }

    fn tile_bytes_moved(&self, rows: u32, keys: u32) -> u128 {
        let s = &self.problem.shape;
        let fold_tiles = self.tile.and_then(|tile| forward_tile::fold_tiles(&self.problem, tile.keys));
        let keeps_query = self.tile.is_none_or(|tile| forward_tile::keeps_query(&self.problem, tile));
        // Of one head: keys loaded, rows of q loaded, and rows of o loaded or stored.
        let (mut loaded_keys, mut loaded_rows, mut moved_rows) = (0u128, 0u128, 0u128);
        for row0 in (0..s.seqlen_q).step_by(rows as usize) {
            let row1 = (row0 + rows).min(s.seqlen_q);
            let first = self.problem.key_interval(row0, s.seqlen_k).0 / keys * keys;
            let last = self.problem.key_interval(row1 - 1, s.seqlen_k).1;
            let loaded = last.saturating_sub(first);
            loaded_keys += loaded as u128;
            // The coop kernels keep q. The tile kernel may load it for each tile of keys, and may add to o in memory on the way.
            let tiles = loaded.div_ceil(keys).max(1);
            let folds = fold_tiles.map_or(0, |of| (tiles - 1) / of);
            loaded_rows += (row1 - row0) as u128 * if keeps_query { 1 } else { tiles as u128 };
            moved_rows += (row1 - row0) as u128 * (1 + 2 * folds as u128);
        }
        let heads = s.batch as u128 * s.heads_q as u128;
        let of_key = (s.head_dim + s.head_dim_v) as u128;
        let elements = loaded_keys * of_key + loaded_rows * s.head_dim as u128 + moved_rows * s.head_dim_v as u128;
        heads * elements * self.problem.element_type.bytes() as u128 + self.lse_bytes()
    }

    /// Bytes that the materialised form moves to and from device memory at the least, with caches of any size: inputs and output once; the scores written, read and
    /// written by the softmax, and read by the second product. `u64::MAX` if they are more.
    pub fn materialized_bytes(&self) -> u64 {
        let s = &self.problem.shape;
        let rows = s.rows() as u128;
        let keys = s.batch as u128 * s.heads_kv as u128 * s.seqlen_k as u128;
        let elements = (rows + keys) * (s.head_dim + s.head_dim_v) as u128;
        let scores = 4 * rows * s.seqlen_k as u128;
        saturated(elements * self.problem.element_type.bytes() as u128 + self.lse_bytes() + 4 * scores)
    }

    fn lse_bytes(&self) -> u128 {
        if self.problem.lse { 4 * self.problem.shape.rows() as u128 } else { 0 }
    }
}

fn saturated(bytes: u128) -> u64 {
    bytes.try_into().unwrap_or(u64::MAX)
}
