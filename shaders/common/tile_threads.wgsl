// The place of a thread in the grid of THREADS_Y x THREADS_X, both even: four threads in a row are a block of 2 x 2. NVIDIA's
// workgroup memory gives 16 bytes to each lane of a subgroup in two cycles instead of four if lanes that differ in bit 0, or
// all that differ in bit 1, read the same. So it is both for what depends on ty alone, and for what depends on tx alone.
fn thread_x(thread: u32) -> u32 {
    return thread / 4u % (THREADS_X / 2u) * 2u + thread % 2u;
}

fn thread_y(thread: u32) -> u32 {
    return thread / 4u / (THREADS_X / 2u) * 2u + thread / 2u % 2u;
}
