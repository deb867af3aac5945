//! Bytes to a device and back.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};

use wgpu::BufferUsages;

use crate::error::Error;
use crate::faults;

/// A storage and uniform buffer with these bytes, padded with zeros to a multiple of 4, and copyable both ways.
pub(crate) fn upload(device: &wgpu::Device, bytes: &[u8]) -> Result<wgpu::Buffer, Error> {
    let (size, limit) = ((bytes.len() as u64).next_multiple_of(4), device.limits().max_buffer_size);
    if size > limit {
        return Err(Error::BindingTooLarge { argument: "upload", bytes: size, limit });
    }
    let usage = BufferUsages::STORAGE | BufferUsages::UNIFORM | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
    faults::caught(device, "upload", || faults::mapped(device, "wgpu-flash-attention upload", usage, bytes))
}

/// Submits a copy of bytes of a buffer; the future has them, and polls the device each time that it is polled.
pub(crate) fn download(
    device: &wgpu::Device,
    queue: &wgpu::Queue,
    buffer: &wgpu::Buffer,
    offset: u64,
    bytes: u64,
) -> impl Future<Output = Result<Vec<u8>, Error>> + use<> {
    let copied = match check_download(device, buffer, offset, bytes) {
        Ok(()) if bytes == 0 => Ok(None),
        Ok(()) => {
            let scopes = faults::Scopes::open(device, "download");
            let copy = copy_to_host(device, queue, buffer, offset, bytes.next_multiple_of(4));
            Ok(Some((scopes.close(), copy)))
        }
        Err(error) => Err(error),
    };
    async move {
        let Some((closed, copy)) = copied? else {
            return Ok(vec![]);
        };
        closed.await?;
        let mut data = copy.await?;
        data.truncate(bytes as usize);
        Ok(data)
    }
}

fn check_download(device: &wgpu::Device, buffer: &wgpu::Buffer, offset: u64, bytes: u64) -> Result<(), Error> {
    let (found, needed) = (buffer.usage(), BufferUsages::COPY_SRC);
    if !found.contains(needed) {
        return Err(Error::BufferUsage { argument: "download", found, needed });
    }
    let size = buffer.size();
    // Whole words are copied.
    let end = bytes.checked_next_multiple_of(4).and_then(|bytes| bytes.checked_add(offset));
    if !offset.is_multiple_of(4) || end.is_none_or(|end| end > size) {
        return Err(Error::DownloadRange { offset, bytes, size });
    }
    let limit = device.limits().max_buffer_size;
    if bytes > limit {
        return Err(Error::BindingTooLarge { argument: "download", bytes, limit });
    }
    Ok(())
}

/// Submits a copy of so many bytes, and maps it.
fn copy_to_host(device: &wgpu::Device, queue: &wgpu::Queue, buffer: &wgpu::Buffer, offset: u64, size: u64) -> Mapped {
    let staging = device.create_buffer(&wgpu::BufferDescriptor {
        label: Some("wgpu-flash-attention download"),
        size,
        usage: BufferUsages::COPY_DST | BufferUsages::MAP_READ,
        mapped_at_creation: false,
    });
    let mut encoder = device.create_command_encoder(&Default::default());
    encoder.copy_buffer_to_buffer(buffer, offset, &staging, 0, size);
    queue.submit([encoder.finish()]);
    let mapped = Arc::new(Mutex::new((None, None::<Waker>)));
    let tell = mapped.clone();
    staging.map_async(wgpu::MapMode::Read, .., move |result| {
        if let Ok(mut state) = tell.lock() {
            state.0 = Some(result);
            if let Some(waker) = state.1.take() {
                waker.wake();
            }
        }
    });
    Mapped { device: device.clone(), staging, mapped }
}

type MapState = (Option<Result<(), wgpu::BufferAsyncError>>, Option<Waker>);

/// Ready when the staging buffer is mapped. On the web the browser wakes it; elsewhere nothing happens unless
/// someone polls the device, so it does, without waiting, and asks to be polled again.
struct Mapped {
    device: wgpu::Device,
    staging: wgpu::Buffer,
    mapped: Arc<Mutex<MapState>>,
}

impl Future for Mapped {
    type Output = Result<Vec<u8>, Error>;

    fn poll(self: Pin<&mut Self>, context: &mut std::task::Context<'_>) -> Poll<Self::Output> {
        if let Err(error) = self.device.poll(wgpu::PollType::Poll) {
            return Poll::Ready(Err(Error::Device(error.to_string())));
        }
        let result = match self.mapped.lock() {
            Ok(mut state) => {
                state.1 = Some(context.waker().clone());
                state.0.take()
            }
            Err(_) => Some(Err(wgpu::BufferAsyncError)),
        };
        match result {
            None => {
                if cfg!(not(target_arch = "wasm32")) {
                    context.waker().wake_by_ref();
                }
                Poll::Pending
            }
            Some(Err(error)) => Poll::Ready(Err(Error::Device(error.to_string()))),
            Some(Ok(())) => Poll::Ready(
                self.staging.get_mapped_range(..).map(|view| view.to_vec()).map_err(|e| Error::Device(e.to_string())),
            ),
        }
    }
}
