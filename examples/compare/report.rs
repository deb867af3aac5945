//! The table of figures, as they are measured.

use std::io::{IsTerminal, Write};

use indicatif::ProgressBar;
use wgpu_flash_attention::{ElementType, Problem, Shape};

use flash_attention_testing::output::OutputFile;
use flash_attention_testing::terminal::Progress;
use flash_attention_testing::timing::Time;

use crate::Result;
use crate::arguments::{Mask, Op};
use crate::feature::Feature;

/// What kernels compute.
#[derive(Clone)]
pub struct Task {
    pub problem: Problem,
    /// The mask that was asked for; a feature may add one.
    pub mask: Mask,
    pub feature: Option<Feature>,
    /// The share of all scores that count as work.
    pub share: f64,
}

impl Task {
    pub fn feature_name(&self) -> &'static str {
        self.feature.map_or("", Feature::name)
    }
}

/// A figure that was checked.
pub struct Figure {
    pub name: String,
    pub op: Op,
    pub task: Task,
    pub time: Time,
    pub extra_bytes: u64,
}

impl Figure {
    fn teraflops(&self) -> f64 {
        let mut all = self.task.problem.clone();
        // The share has what it masks.
        all.causal = None;
        let flops = match self.op {
            Op::Forward => all.forward_flops(),
            Op::Backward => all.backward_flops(),
            Op::Both => all.forward_flops() + all.backward_flops(),
        };
        flops * self.task.share / self.time.median * 1e-12
    }

    /// Of K and V, each read once: what bounds the forward pass of few queries.
    fn gigabytes_per_second(&self) -> Option<f64> {
        if self.op != Op::Forward {
            return None;
        }
        let problem = &self.task.problem;
        let s = &problem.shape;
        let elements = s.batch as f64 * s.heads_kv as f64 * s.seqlen_k as f64 * (s.head_dim + s.head_dim_v) as f64;
        Some(elements * problem.element_type.bytes() as f64 / self.time.median * 1e-9)
    }
}

/// Prints the rows of the table as they are measured, and keeps them.
pub struct Report {
    pub bar: ProgressBar,
    pub csv: Option<OutputFile>,
    /// The most bytes in buffers at one time, less what drivers take for themselves.
    pub most_bytes: u64,
    pub figures: Vec<Figure>,
    pub all_right: bool,
}

impl Report {
    /// On stderr: what is about to be done, with what it takes. The table alone is on stdout.
    pub fn note(&self, text: &str) {
        self.bar.suspend(|| eprintln!("compare: {text}"));
    }

    /// A line on stderr if what follows takes more than a second and no bar is there to show it.
    pub fn progress(&self, what: String) -> Option<Progress> {
        (!std::io::stderr().is_terminal()).then(|| Progress::of("compare", what))
    }

    fn line(name: &str, op: Op, task: &Task, rest: &str) -> String {
        let (mask, feature) = (task.mask.name(), task.feature_name());
        let (ty, shape) = (task.problem.element_type.to_string(), label(&task.problem.shape));
        format!("{name:<44} {op:<16} {ty:<5} {shape:<18} {mask:<7} {feature:<13} {rest}")
    }

    /// The titles of the columns, of the table and of the file.
    pub fn header(&mut self) -> Result<()> {
        let line = format!(
            "{:<44} {:<16} {:<5} {:<18} {:<7} {:<13} {:>10} {:>10} {:>9} {:>9} {:>12} {:>10} {:>12} {:>10}",
            "kernel",
            "op",
            "dtype",
            "B,H,N,D",
            "",
            "",
            "median ms",
            "min ms",
            "TFLOP/s",
            "K, V GB/s",
            "extra memory",
            "speed-up",
            "over without",
            "over share"
        );
        self.bar.suspend(|| println!("{line}"));
        if let Some(csv) = &mut self.csv {
            let titles =
                "kernel,op,dtype,B,H,Hkv,N,D,causal,median_ms,TFLOPS,Nk,GBps,feature,over_without,share,over_share";
            writeln!(csv, "{titles}")?;
        }
        Ok(())
    }

    /// A kernel without a figure, and why.
    pub fn refuse(&mut self, name: &str, op: Op, task: &Task, reason: &str) {
        self.bar.suspend(|| println!("{}", Self::line(name, op, task, reason)));
    }

    /// The figure of this kernel on the problem of `task`, in this type and with this feature.
    fn find(&self, name: &str, op: Op, task: &Task, of: (ElementType, Option<Feature>)) -> Option<&Figure> {
        self.figures.iter().find(|other| {
            let Task { problem, mask, feature, .. } = &other.task;
            (other.name.as_str(), other.op, problem.shape, *mask) == (name, op, task.problem.shape, task.mask)
                && (problem.element_type, *feature) == of
        })
    }

    pub fn add(&mut self, figure: Figure) -> Result<()> {
        // The figure may be its own yardstick.
        self.figures.push(figure);
        let figure = &self.figures[self.figures.len() - 1];
        let Figure { name, op, task, time, extra_bytes } = figure;
        let Task { problem, mask, feature, share } = task;
        let naive = self.find("naive", *op, task, (ElementType::F32, *feature));
        let speed_up = naive.map_or("-".into(), |naive| format!("{:.2}", naive.time.median / time.median));
        let without = feature.and_then(|_| self.find(name, *op, task, (problem.element_type, None)));
        let over_without = without.map(|other| time.median / other.time.median);
        // The share of what counts without the feature.
        let over_share = without.zip(over_without).and_then(|(other, over)| {
            let less = share / other.task.share;
            (less != 1.0).then_some(over / less)
        });
        let shown = |x: Option<f64>, decimals: usize| x.map_or("-".into(), |x| format!("{x:.decimals$}"));
        let rest = format!(
            "{:>10.4} {:>10.4} {:>9.4} {:>9} {:>8.3} MiB {speed_up:>10} {:>12} {:>10}",
            time.median * 1e3,
            time.min * 1e3,
            figure.teraflops(),
            shown(figure.gigabytes_per_second(), 1),
            *extra_bytes as f64 / 1_048_576.0,
            shown(over_without, 3),
            shown(over_share, 3),
        );
        self.bar.suspend(|| println!("{}", Self::line(name, *op, task, &rest)));
        if let Some(csv) = &mut self.csv {
            let s = &problem.shape;
            let written = |x: Option<f64>, decimals: usize| x.map_or(String::new(), |x| format!("{x:.decimals$}"));
            writeln!(
                csv,
                "{name},{op},{},{},{},{},{},{},{},{:.6},{:.6},{},{},{},{},{share:.6},{}",
                problem.element_type,
                s.batch,
                s.heads_q,
                s.heads_kv,
                s.seqlen_q,
                s.head_dim,
                u8::from(*mask != Mask::None),
                time.median * 1e3,
                figure.teraflops(),
                s.seqlen_k,
                written(figure.gigabytes_per_second(), 3),
                task.feature_name(),
                written(over_without, 6),
                written(over_share, 6)
            )?;
        }
        Ok(())
    }
}

/// A shape as `--shapes` takes it.
pub fn label(s: &Shape) -> String {
    let heads = if s.group() == 1 { s.heads_q.to_string() } else { format!("{}/{}", s.heads_q, s.heads_kv) };
    let queries = if s.seqlen_q == s.seqlen_k { String::new() } else { format!(",{}", s.seqlen_q) };
    format!("{},{heads},{},{}{queries}", s.batch, s.seqlen_k, s.head_dim)
}
