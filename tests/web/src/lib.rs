//! The kernels in a browser: the part that runs there.
#![cfg(target_arch = "wasm32")]

mod cases;

use std::sync::{Arc, Mutex};

use cases::Entry;
use flash_attention_testing::case;
use wasm_bindgen::prelude::*;
use wgpu_flash_attention::reference::accept::Verdict;
use wgpu_flash_attention::{Causal, Context, HostTensor, Plan, PlanOptions, Problem, SdpaOptions, wgpu};

/// What was found of each result, or what is wrong.
type Compared = Result<Vec<(&'static str, Verdict)>, String>;

#[wasm_bindgen]
extern "C" {
    #[wasm_bindgen(js_namespace = console)]
    fn error(text: &str);
}

/// Runs all cases, or a few, on a device with WebGPU's default limits, or with the adapter's. Says a line for each; returns how
/// many failed.
#[wasm_bindgen]
pub async fn run(adapter_limits: bool, few: bool, say: js_sys::Function) -> Result<u32, JsError> {
    std::panic::set_hook(Box::new(|info| error(&info.to_string())));
    let say = |line: String| drop(say.call1(&JsValue::NULL, &line.into()));
    let (context, _, errors) = device(adapter_limits).await.map_err(|error| JsError::new(&error))?;
    let limits = context.device().limits();
    say(format!(
        "{} limits: {} bytes of workgroup memory, {} invocations",
        if adapter_limits { "The adapter's" } else { "WebGPU's default" },
        limits.max_compute_workgroup_storage_size,
        limits.max_compute_invocations_per_workgroup
    ));
    let mut entries = cases::entries();
    entries.retain(|entry| entry.few || !few);
    let (mut passed, mut count) = (0, 0);
    let mut report = |name: &str, begin: f64, mut result: Compared| {
        // What the browser refused leaves zeros or poison behind; its own words say more.
        let refused = std::mem::take(&mut *errors.lock().unwrap());
        if !refused.is_empty() {
            result = Err(refused.join("; "));
        }
        count += 1;
        passed += u32::from(result.is_ok());
        let (verdict, words) = match result {
            Ok(measured) => {
                let words = measured
                    .iter()
                    .map(|(name, verdict)| format!("{name} {:.0} % of its bound", 100.0 * verdict.ratio));
                ("PASS", words.collect::<Vec<_>>().join(", "))
            }
            Err(why) => ("FAIL", why),
        };
        say(format!("{verdict} {name}: {words} ({:.0} ms)", js_sys::Date::now() - begin));
    };
    for entry in entries {
        let begin = js_sys::Date::now();
        report(&entry.name, begin, check(&entry, &context).await);
    }
    let begin = js_sys::Date::now();
    report("host slices f32, top-left", begin, host_slices(&context).await);
    let begin = js_sys::Date::now();
    report("a destroyed device and missing matrices are errors", begin, errors_are_errors(adapter_limits).await);
    say(format!("{passed} of {count} cases passed"));
    Ok(count - passed)
}

/// A device, and what goes wrong on it that no one asked about.
async fn device(adapter_limits: bool) -> Result<(Context, wgpu::Adapter, Arc<Mutex<Vec<String>>>), String> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let adapter = instance.request_adapter(&Default::default()).await.map_err(|error| error.to_string())?;
    let required_limits = if adapter_limits { adapter.limits() } else { wgpu::Limits::default() };
    let descriptor = wgpu::DeviceDescriptor { required_limits, ..Default::default() };
    let (device, queue) = adapter.request_device(&descriptor).await.map_err(|error| error.to_string())?;
    let errors = Arc::new(Mutex::new(vec![]));
    let list = errors.clone();
    device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| list.lock().unwrap().push(error.to_string())));
    Ok((Context::new(&device, &queue), adapter, errors))
}

/// Computes the case twice and compares with the oracle.
async fn check(entry: &Entry, context: &Context) -> Compared {
    match entry.gradients {
        None => {
            let case = entry.case.prepare();
            let plan = plan(context, &case.problem, &entry.options).await?;
            let mut runs = vec![];
            for round in 0..2 {
                let outputs = case.submit(context, &plan, round)?;
                runs.push(case.take(&download(context, &outputs).await?, round)?);
            }
            same(&runs)?;
            case.compare(&runs[0])
        }
        Some(ask) => {
            let case = entry.case.prepare_backward(ask);
            let plan = plan(context, &case.problem, &entry.options).await?;
            let mut runs = vec![];
            for round in 0..2 {
                let outputs = case.submit(context, &plan, round)?;
                runs.push(case.take(&download(context, &outputs).await?, round)?);
            }
            same(&runs)?;
            case.compare(&runs[0])
        }
    }
}

/// The function that applications call first.
async fn host_slices(context: &Context) -> Compared {
    let shape = [1, 4, 100, 64];
    let case = case(1, [4, 4], [100, 100], [64, 64]).no_lse().causal(Causal::TopLeft).prepare();
    let [q, k, v] = &case.seen();
    let [q, k, v] = [q, k, v].map(|data| HostTensor { data, shape });
    let options = SdpaOptions::default().is_causal(true);
    let out = context.scaled_dot_product_attention_async(q, k, v, &options).await.map_err(|error| error.to_string())?;
    case.compare(&(out.into_iter().map(f32::to_bits).collect(), vec![]))
}

/// What must not go unnoticed.
async fn errors_are_errors(adapter_limits: bool) -> Compared {
    let (context, adapter, _) = device(adapter_limits).await?;
    if context.clone().with_cooperative_matrices(&adapter).await.is_ok() {
        return Err("a context with cooperative matrices, which browsers do not have".into());
    }
    context.device().destroy();
    match host_slices(&context).await {
        Ok(_) => Err("results from a device that was destroyed".into()),
        Err(_) => Ok(vec![]),
    }
}

async fn plan(context: &Context, problem: &Problem, options: &PlanOptions) -> Result<Plan, String> {
    context.plan_async(problem, options).await.map_err(|error| error.to_string())
}

fn same<T: PartialEq>(runs: &[T]) -> Result<(), String> {
    if runs[0] == runs[1] { Ok(()) } else { Err("two runs gave different bits".into()) }
}

/// All bytes of the buffers.
async fn download(context: &Context, buffers: &[wgpu::Buffer]) -> Result<Vec<Vec<u8>>, String> {
    let mut all = vec![];
    for buffer in buffers {
        all.push(context.download_async(buffer, 0, buffer.size()).await.map_err(|error| error.to_string())?);
    }
    Ok(all)
}
