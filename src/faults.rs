//! What wgpu finds wrong with a call, as an [`Error`] where it would otherwise panic.

use std::future::Future;
use std::task::{Context, Poll, Waker};

use crate::Error;

/// Runs `f`; what wgpu complains of meanwhile is the error, since it is the cause of whatever `f` then says. `what` names what
/// is being made.
///
/// A browser answers only later, so there complaints go where wgpu sends those that nobody catches; the library's
/// asynchronous functions wait for them by [`caught_async`].
pub(crate) fn caught<T>(
    device: &wgpu::Device,
    what: &'static str,
    f: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    if cfg!(target_arch = "wasm32") {
        return f();
    }
    let mut future = std::pin::pin!(caught_async(device, what, f));
    // Off the web scopes have their answer when they close.
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => Err(Error::Device(format!("{what}: an error scope stayed open"))),
    }
}

/// The same for asynchronous functions: `f` runs at once, and the future has what wgpu said of it.
pub(crate) fn caught_async<T>(
    device: &wgpu::Device,
    what: &'static str,
    f: impl FnOnce() -> Result<T, Error>,
) -> impl Future<Output = Result<T, Error>> {
    let scopes = Scopes::open(device, what);
    let result = f();
    let closed = scopes.close();
    async move {
        closed.await?;
        result
    }
}

/// Error scopes of every kind, of this thread.
pub(crate) struct Scopes {
    what: &'static str,
    /// Those opened last come first: wgpu wants them closed in that order, also where a panic drops them.
    scopes: [wgpu::ErrorScopeGuard; 3],
}

impl Scopes {
    pub(crate) fn open(device: &wgpu::Device, what: &'static str) -> Self {
        let filters = [wgpu::ErrorFilter::OutOfMemory, wgpu::ErrorFilter::Validation, wgpu::ErrorFilter::Internal];
        let mut scopes = filters.map(|filter| device.push_error_scope(filter));
        scopes.reverse();
        Scopes { what, scopes }
    }

    /// Closes them at once, on this thread; the future has what they caught.
    pub(crate) fn close(self) -> impl Future<Output = Result<(), Error>> {
        let closed = self.scopes.map(|scope| scope.pop());
        async move {
            let mut complaint = None;
            for error in closed {
                // Out of memory comes last, and is the cause of what was found invalid after it.
                complaint = error.await.or(complaint);
            }
            match complaint {
                Some(wgpu::Error::OutOfMemory { .. }) => Err(Error::OutOfMemory { what: self.what }),
                Some(error) => Err(Error::Device(format!("{}: {}", self.what, in_one_line(&error.to_string())))),
                None => Ok(()),
            }
        }
    }
}

/// wgpu tells of causes in lines of their own.
fn in_one_line(text: &str) -> String {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

/// An error if the device is lost, which wgpu tells nobody who makes a buffer or a pipeline: mapping one is the way to notice.
pub(crate) fn alive(device: &wgpu::Device) -> Result<(), Error> {
    mapped(device, "wgpu-flash-attention: is the device there?", wgpu::BufferUsages::COPY_SRC, &[0; 4]).map(|_| ())
}

/// A buffer with these bytes, whose number is a multiple of 4 above 0. For use inside [`caught`].
pub(crate) fn mapped(
    device: &wgpu::Device,
    label: &str,
    usage: wgpu::BufferUsages,
    bytes: &[u8],
) -> Result<wgpu::Buffer, Error> {
    let size = (bytes.len() as u64).next_multiple_of(4).max(4);
    let buffer =
        device.create_buffer(&wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: true });
    match buffer.get_mapped_range_mut(..) {
        Ok(mut range) => range.slice(..bytes.len()).copy_from_slice(bytes),
        // wgpu panics if what was never mapped is unmapped.
        Err(_) => return Err(Error::Device("it is lost: a new buffer cannot be mapped".into())),
    }
    buffer.unmap();
    Ok(buffer)
}

/// As [`wgpu::Device::create_buffer`], within the device's limit.
pub(crate) fn buffer(
    device: &wgpu::Device,
    what: &'static str,
    size: u64,
    usage: wgpu::BufferUsages,
) -> Result<wgpu::Buffer, Error> {
    let limit = device.limits().max_buffer_size;
    if size > limit {
        return Err(Error::BindingTooLarge { argument: what, bytes: size, limit });
    }
    caught(device, what, || {
        alive(device)?;
        let label = Some(what);
        Ok(device.create_buffer(&wgpu::BufferDescriptor { label, size, usage, mapped_at_creation: false }))
    })
}
