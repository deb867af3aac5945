//! How long a pass takes on the device.

use std::time::Instant;

use wgpu_flash_attention::{BoundPass, Context, Error, wgpu};

/// What [`pass_times`] measures on this device, in words.
pub fn clock(context: &Context) -> &'static str {
    if has_timestamps(context) { "device time" } else { "host time of submit and wait" }
}

fn has_timestamps(context: &Context) -> bool {
    context.device().features().contains(wgpu::Features::TIMESTAMP_QUERY)
}

/// Seconds that each of `passes` compute passes takes, every one of them `bound` (a forward pass, say, and a backward one)
/// `runs` times in a row. With timestamps all are queued before the host waits for anything, so that the device does
/// not idle in between.
pub fn pass_times(context: &Context, bound: &[BoundPass], runs: u32, passes: u32) -> Result<Vec<f64>, Error> {
    let (device, queue) = (context.device(), context.queue());
    let wait =
        || device.poll(wgpu::PollType::wait_indefinitely()).map(drop).map_err(|error| Error::Device(error.to_string()));
    let submit = |timestamp_writes| {
        let mut encoder = device.create_command_encoder(&Default::default());
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: None, timestamp_writes });
        for _ in 0..runs {
            bound.iter().for_each(|bound| bound.record(&mut pass));
        }
        drop(pass);
        queue.submit([encoder.finish()]);
    };
    wait()?;
    if !has_timestamps(context) {
        let timed = |_| {
            let start = Instant::now();
            submit(None);
            wait()?;
            Ok(start.elapsed().as_secs_f64())
        };
        return (0..passes).map(timed).collect();
    }
    let query_set = device.create_query_set(&wgpu::QuerySetDescriptor {
        label: None,
        ty: wgpu::QueryType::Timestamp,
        count: 2 * passes,
    });
    for n in 0..passes {
        submit(Some(wgpu::ComputePassTimestampWrites {
            query_set: &query_set,
            beginning_of_pass_write_index: Some(2 * n),
            end_of_pass_write_index: Some(2 * n + 1),
        }));
    }
    let bytes = 16 * passes as u64;
    let ticks = device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: bytes,
        usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
        mapped_at_creation: false,
    });
    let mut encoder = device.create_command_encoder(&Default::default());
    encoder.resolve_query_set(&query_set, 0..2 * passes, &ticks, 0);
    queue.submit([encoder.finish()]);
    let ticks: Vec<[u64; 2]> = bytemuck::pod_collect_to_vec(&context.download(&ticks, 0, bytes)?);
    let period = queue.get_timestamp_period() as f64 * 1e-9;
    Ok(ticks.iter().map(|[begin, end]| end.saturating_sub(*begin) as f64 * period).collect())
}

/// Seconds of one run.
pub struct Time {
    pub median: f64,
    pub min: f64,
    pub passes: usize,
}

impl Time {
    /// How far the median lies above the minimum, in parts of it.
    fn spread(&self) -> f64 {
        self.median / self.min - 1.0
    }
}

/// Times what is bound on a busy device: an idle GPU lowers its clock within moments, so the timed passes follow
/// without a gap on at least 250 ms of the same work, and each takes at least 2 ms and, on a GPU, two dispatches. Where the
/// median is more than 3 % above the minimum the clock has changed meanwhile; then once or twice again, and the steadiest
/// counts.
pub fn measure(context: &Context, bound: &[BoundPass]) -> Result<Time, Error> {
    // A processor needs no warming up, and takes its time as it is.
    let software = context.device().adapter_info().device_type == wgpu::DeviceType::Cpu;
    // Somewhat more of both, since the estimate comes from a device that may still be getting faster. No more than that:
    // one at its limit of power soon slows down.
    let (warm_up, passes, least_runs) = if software { (0.0, 5, 1.0) } else { (0.3, 15, 2.0) };
    let times = |estimate: f64, warm_up: f64, passes| -> Result<Vec<f64>, Error> {
        let runs = (0.003 / estimate).ceil().max(least_runs);
        let warm = (warm_up / (runs * estimate)).ceil() as u32;
        let all = pass_times(context, bound, runs as u32, warm + passes)?;
        Ok(all[warm as usize..].iter().map(|seconds| seconds / runs).collect())
    };
    // No pass is that short; a clock may be that coarse.
    let shortest = 1e-6;
    let cold = pass_times(context, bound, 1, 1)?[0].max(shortest);
    let estimate = times(cold, warm_up / 6.0, 1)?[0].max(shortest);
    let once = || -> Result<Time, Error> {
        let mut times = times(estimate, warm_up, passes)?;
        times.sort_by(f64::total_cmp);
        Ok(Time { median: times[times.len() / 2], min: times[0], passes: times.len() })
    };
    let mut time = once()?;
    for _ in 0..if software { 0 } else { 2 } {
        if time.spread() > 0.03 {
            let again = once()?;
            time = if again.spread() < time.spread() { again } else { time };
        }
    }
    Ok(time)
}
