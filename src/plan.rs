//! A problem on a device, ready to be recorded.

use crate::bind::OffsetAlignments;
use crate::context::Context;
use crate::error::Error;
use crate::faults;
use crate::names::{CoopForm, Kernel};
use crate::options::PlanOptions;
use crate::problem::Problem;
use crate::recipe::{Recipe, Recipes, recipes};
use crate::schedule::Schedule;
use crate::tune::Tile;

impl Context {
    /// Checks the problem and decides how to compute it. Builds the pipelines of the forward pass that no earlier plan of this
    /// context built, and a small buffer of parameters. Those of the backward pass are built when they are asked for
    /// ([`Plan::prepare_backward`]).
    ///
    /// Drivers compile a pipeline in some milliseconds to some seconds; sizes and strides are not compiled in, so that one serves
    /// every length of a sequence. To have them ready before they are needed, make the plan early, on a thread of its own if
    /// you like: contexts and plans are `Send` and `Sync`, clones of a context share pipelines, and a plan is kept and used
    /// again. A [pipeline cache](Context::with_pipeline_cache) keeps them from one start of the program to the next.
    pub fn plan(&self, problem: &Problem) -> Result<Plan, Error> {
        self.plan_with(problem, &PlanOptions::default())
    }

    /// As [`Context::plan`], with some of its choices made by the caller.
    pub fn plan_with(&self, problem: &Problem, options: &PlanOptions) -> Result<Plan, Error> {
        faults::caught(self.device(), "plan", || Plan::new(self, problem, options))
    }

    /// As [`Context::plan_with`] and [`Plan::prepare_backward`], for the web, where only an asynchronous function can wait for the
    /// browser's verdict on the pipelines. Off the web it blocks as long as [`Context::plan`] does.
    pub async fn plan_async(&self, problem: &Problem, options: &PlanOptions) -> Result<Plan, Error> {
        let build = || {
            let plan = Plan::new(self, problem, options)?;
            plan.prepare_backward()?;
            Ok(plan)
        };
        let result = faults::caught_async(self.device(), "plan", build).await;
        if result.is_err() {
            // A browser tells only now that a pipeline failed, but not which.
            self.pipelines().clear();
        }
        result
    }
}

/// How a problem is computed on a device. Made by [`Context::plan`]; used any number of times.
///
/// `Display` explains it in words.
pub struct Plan {
    pub(crate) device: wgpu::Device,
    pub(crate) problem: Problem,
    pub(crate) offset_alignments: OffsetAlignments,
    pub(crate) forward: Schedule,
    pub(crate) backward: Option<Schedule>,
    pub(crate) tile: Option<Tile>,
    /// Splits of the keys, for the decode kernel.
    pub(crate) splits: Option<u32>,
    /// Queries and keys of a tile, for kernels that have tiles.
    pub(crate) rows_and_keys: Option<(u32, u32)>,
}

impl Plan {
    fn new(context: &Context, problem: &Problem, options: &PlanOptions) -> Result<Plan, Error> {
        problem.validate()?;
        faults::alive(context.device())?;
        let Recipes { forward: recipe, backward } = recipes(problem, context.facts(), options)?;
        let schedule =
            |recipe: &Recipe, backward| Schedule::new(context.pipelines(), context.limits(), problem, recipe, backward);
        let backward = backward.map(|recipe| schedule(&recipe, true)).transpose()?;
        let forward = schedule(&recipe, false)?;
        forward.build()?;
        Ok(Plan {
            device: context.device().clone(),
            problem: problem.clone(),
            offset_alignments: OffsetAlignments::of(context.limits()),
            forward,
            backward,
            tile: recipe.tile,
            splits: recipe.splits,
            rows_and_keys: recipe.rows_and_keys,
        })
    }

    /// Builds the pipelines of the backward pass, if the problem has gradients and they are not there yet. The first backward pass
    /// does so otherwise: drivers can take seconds, and those who only want the forward pass do without.
    pub fn prepare_backward(&self) -> Result<(), Error> {
        let build = || self.backward.as_ref().map_or(Ok(()), Schedule::build);
        faults::caught(&self.device, "backward plan", build)
    }

    /// The problem that this plan computes.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// The kernel of the forward pass.
    pub fn kernel(&self) -> Kernel {
        self.forward.kernel
    }

    /// The kernel of the backward pass; `None` for a problem without gradients.
    pub fn backward_kernel(&self) -> Option<Kernel> {
        self.backward.as_ref().map(|schedule| schedule.kernel)
    }

    /// The tile kernel's tile; `None` for another kernel.
    #[doc(hidden)]
    pub fn tile(&self) -> Option<Tile> {
        self.tile
    }

    /// The coop kernel's form; `None` for another kernel.
    pub fn coop_form(&self) -> Option<CoopForm> {
        self.forward.coop_form.as_ref().map(|&(form, _)| form)
    }

    /// The coop kernel's form in the backward pass; `None` for another kernel, and for a problem without gradients.
    pub fn backward_coop_form(&self) -> Option<CoopForm> {
        self.backward.as_ref()?.coop_form.as_ref().map(|&(form, _)| form)
    }

    /// Bytes of the buffer that [`ForwardBuffers::workspace`](crate::ForwardBuffers::workspace) needs; 0 if none.
    pub fn workspace_bytes(&self) -> u64 {
        self.forward.workspace_bytes
    }

    /// Bytes of the buffer that [`BackwardBuffers::workspace`](crate::BackwardBuffers::workspace) needs: some for each row, some
    /// for each head in f32 and scaled bf16 on cooperative matrices, and more for the naive kernel. 0 for a problem without gradients.
    pub fn backward_workspace_bytes(&self) -> u64 {
        self.backward.as_ref().map_or(0, |schedule| schedule.workspace_bytes)
    }

    /// A buffer for [`ForwardBuffers::workspace`](crate::ForwardBuffers::workspace), or `None` if the plan needs none.
    /// Its contents need not be kept between calls. One serves all plans and passes that are recorded for one queue, if it is as large as the
    /// largest needs, since wgpu orders them.
    /// Out of memory, and on a device that is lost, it is an error.
    pub fn create_workspace(&self) -> Result<Option<wgpu::Buffer>, Error> {
        self.workspace_of(self.workspace_bytes())
    }

    /// The same for [`BackwardBuffers::workspace`](crate::BackwardBuffers::workspace).
    pub fn create_backward_workspace(&self) -> Result<Option<wgpu::Buffer>, Error> {
        self.workspace_of(self.backward_workspace_bytes())
    }

    fn workspace_of(&self, size: u64) -> Result<Option<wgpu::Buffer>, Error> {
        (size > 0).then(|| faults::buffer(&self.device, "workspace", size, wgpu::BufferUsages::STORAGE)).transpose()
    }
}

impl std::fmt::Debug for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plan")
            .field("problem", &self.problem)
            .field("kernel", &self.kernel())
            .field("tile", &self.tile)
            .field("workspace_bytes", &self.workspace_bytes())
            .field("backward_kernel", &self.backward_kernel())
            .finish_non_exhaustive()
    }
}
