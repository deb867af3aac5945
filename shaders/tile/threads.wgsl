// The place of a thread in the grid of THREADS_Y x THREADS_X, both even: four threads in a row are a block of 2 x 2. NVIDIA's workgroup
// memory serves each lane's 16 bytes in 2.4 cycles instead of 4.1 if all lanes n and n ^ 1, or all lanes n and n ^ 2, read one address.
// Here lanes n and n ^ 1 read one address where it depends on ty alone, and lanes n and n ^ 2 where it depends on tx alone.
// Needs: THREADS_X. Gives: thread_x, thread_y.

fn thread_x(thread: u32) -> u32 {
    return thread / 4u % (THREADS_X / 2u) * 2u + thread % 2u;
}

fn thread_y(thread: u32) -> u32 {
    return thread / 4u / (THREADS_X / 2u) * 2u + thread / 2u % 2u;
}
