//! Whether tensors in one buffer have bytes in common.

/// The bytes of a tensor: runs of `width` bytes, of which `axes` says how far apart they are and how many.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    start: i128,
    /// Stride in bytes and length, the largest stride first.
    axes: Vec<(u64, u32)>,
    width: u64,
}

/// The most differences of places that [`Region::meets`] looks at before it assumes the worst. Tensors with a stride in common,
/// as those that are packed into one have, need a few.
const PATIENCE: u32 = 4096;

impl Region {
    /// So many bytes in a row.
    pub(crate) fn bytes(bytes: u64) -> Self {
        Region { start: 0, axes: vec![], width: bytes }
    }

    /// The elements of a tensor of these sizes, none of them 0, from its first element on. The strides are those from one batch entry, head
    /// and row to the next, in elements.
    pub(crate) fn of(offset: u64, strides: [u64; 3], [batch, heads, rows, dim]: [u32; 4], element_bytes: u64) -> Self {
        let axes = strides.into_iter().zip([batch, heads, rows]);
        let used = axes.filter(|&(stride, n)| n > 1 && stride > 0);
        let mut axes: Vec<_> = used.map(|(stride, n)| (stride.saturating_mul(element_bytes), n)).collect();
        axes.sort_unstable_by_key(|&(stride, _)| std::cmp::Reverse(stride));
        let start = offset as i128 * element_bytes as i128;
        Region { start, axes, width: dim as u64 * element_bytes }
    }

    /// The same, `bytes` further into the buffer.
    pub(crate) fn at(mut self, bytes: u64) -> Self {
        self.start += bytes as i128;
        self
    }

    /// At least the 4-byte words that its bytes lie in.
    pub(crate) fn in_words(mut self) -> Self {
        if self.start % 4 == 0 && self.axes.iter().all(|&(stride, _)| stride.is_multiple_of(4)) {
            self.width = self.width.next_multiple_of(4);
        } else {
            self.width += 6;
            self.start -= 3;
        }
        self
    }

    /// Whether the two have a byte in common; also if it would take long to find out.
    pub(crate) fn meets(&self, other: &Region) -> bool {
        let distance = other.start - self.start;
        let mut patience = PATIENCE;
        meet(distance, (&self.axes, self.width), (&other.axes, other.width), &mut patience)
    }
}

/// Axes and width of a region.
type Runs<'a> = (&'a [(u64, u32)], u64);

/// Bytes from the first to the last.
fn span((axes, width): Runs<'_>) -> i128 {
    axes.iter().map(|&(stride, n)| stride as i128 * (n as i128 - 1)).sum::<i128>() + width as i128
}

/// The length of the first axis if it has this stride, and the rest; otherwise 1, and all of it.
fn without((axes, width): Runs<'_>, stride: u64) -> (i128, Runs<'_>) {
    match axes {
        [(s, n), rest @ ..] if *s == stride => (*n as i128, (rest, width)),
        axes => (1, (axes, width)),
    }
}

/// Whether two regions meet of which the second begins `distance` bytes after the first.
///
/// Places on the axes of the largest stride matter only by their difference: for each that brings what is left of the two within
/// reach of each other, the question is the same one with an axis less.
fn meet(distance: i128, a: Runs<'_>, b: Runs<'_>, patience: &mut u32) -> bool {
    if distance >= span(a) || distance + span(b) <= 0 {
        return false;
    }
    let first = |axes: &[(u64, u32)]| axes.first().map_or(0, |&(stride, _)| stride);
    let stride = first(a.0).max(first(b.0));
    if stride == 0 {
        return true;
    }
    let ((count_a, a), (count_b, b)) = (without(a, stride), without(b, stride));
    let stride = stride as i128;
    let least = ((distance - span(a)).div_euclid(stride) + 1).max(1 - count_b);
    let most = (-(-distance - span(b)).div_euclid(stride) - 1).min(count_a - 1);
    let mut difference = least;
    while difference <= most {
        if *patience == 0 {
            return true;
        }
        *patience -= 1;
        if meet(distance - difference * stride, a, b, patience) {
            return true;
        }
        difference += 1;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every byte of a region.
    fn all(region: &Region) -> Vec<i128> {
        let mut places = vec![region.start];
        for &(stride, n) in &region.axes {
            places = places.iter().flat_map(|p| (0..n as u64).map(move |x| p + (x * stride) as i128)).collect();
        }
        places.iter().flat_map(|p| *p..p + region.width as i128).collect()
    }

    /// Against a list of all bytes, for small tensors of all kinds.
    #[test]
    fn two_tensors_meet_where_they_have_a_byte_in_common() {
        let mut state = 1u64;
        let mut next = |most: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % (most + 1)
        };
        let (mut met, mut apart) = (0, 0);
        for _ in 0..20_000 {
            let strides = [next(40), next(20), next(8)];
            // Half of them have strides in common.
            let mut region = |common: bool| {
                let [batch, head, row] = if common { strides } else { [next(40), next(20), next(8)] };
                let offset = next(20);
                let sizes = [1 + next(2), 1 + next(3), 1 + next(3), 1 + next(4)].map(|n| n as u32);
                Region::of(offset, [batch, head, row], sizes, 2)
            };
            let (a, b) = (region(true), region(strides[0] % 2 == 0));
            let bytes = all(&a);
            let expected = all(&b).iter().any(|byte| bytes.contains(byte));
            assert_eq!(a.meets(&b), expected, "{a:?} {b:?}");
            assert_eq!(b.meets(&a), expected, "{b:?} {a:?}");
            *if expected { &mut met } else { &mut apart } += 1;
            // Words are no less than bytes.
            let words = all(&a.clone().in_words());
            assert!(bytes.iter().all(|byte| (byte / 4 * 4..byte / 4 * 4 + 4).all(|b| words.contains(&b))), "{a:?}");
        }
        assert!(met > 1000 && apart > 1000, "{met} {apart}");
    }

    /// dq, dk and dv in one `[position, heads of q | of k | of v, dim]`, of a long sequence.
    #[test]
    fn packed_tensors_do_not_meet() {
        let (positions, dim, row) = (1 << 20, 64, (8 + 2 + 2) * 64);
        let part = |first: u64, heads: u32| Region::of(first * 64, [row << 20, 64, row], [3, heads, positions, dim], 4);
        let [q, k, v] = [part(0, 8), part(8, 2), part(10, 2)];
        assert!(!q.meets(&k) && !k.meets(&v) && !q.meets(&v));
        assert!(q.meets(&part(7, 2)) && part(7, 2).meets(&q));
    }

    /// Strides that have nothing to do with each other would take long: the answer is the safe one.
    #[test]
    fn patience_ends() {
        let region = |offset, row| Region::of(offset, [0, 0, row], [1, 1, 1 << 29, 1], 4);
        assert!(region(0, 1001).meets(&region(1, 1003)));
    }
}
