//! Where the elements of a matrix lie in the lanes of a subgroup.

use super::format::MatrixFormat;

/// A bit of the number of a lane, or of the number of an element that it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bit {
    /// A bit of the lane.
    Lane(u32),
    /// A bit of the element.
    Element(u32),
}

/// Where a square matrix lies in the lanes of a subgroup: the bits of lane and element are the bits of row and column,
/// in another order.
///
/// So the positions of a lane and of an element add: element e of lane i is at `position(i, 0) + position(0, e)`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MatrixLayout {
    /// What each bit of the row is, the lowest first.
    pub row: Vec<Bit>,
    /// What each bit of the column is, the lowest first.
    pub column: Vec<Bit>,
}

/// How elements lie that are not in a [`MatrixLayout`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// The numbers do not make a matrix.
    #[error("{found} indices in {lanes} lanes of {elements} elements are no matrix with {size} rows and columns")]
    Shape {
        /// Rows and columns.
        size: u32,
        /// Lanes.
        lanes: u32,
        /// Elements of each lane.
        elements: u32,
        /// How many indices were given.
        found: usize,
    },
    /// A bit that is not one bit of row or column.
    #[error("{bit:?} alone is at index {index:#x}, which has not one bit")]
    NotOneBit {
        /// The bit.
        bit: Bit,
        /// What the element holds whose only bit it is.
        index: u32,
    },
    /// Two bits that are the same bit of row or column: some elements are held twice.
    #[error("{first:?} and {second:?} are the same bit of row and column")]
    SameBit {
        /// The lower.
        first: Bit,
        /// The higher.
        second: Bit,
    },
    /// An element that is not where its bits say.
    #[error("element {element} of lane {lane} is at index {found:#x}; by its bits it would be at {expected:#x}")]
    NotLinear {
        /// The lane.
        lane: u32,
        /// Its element.
        element: u32,
        /// The index that it holds.
        found: u32,
        /// The sum of what its bits hold.
        expected: u32,
    },
}

impl MatrixLayout {
    /// Finds the layout from what the elements of a matrix of indices are: `indices[lane * elements + element]` is
    /// `row * size + column`.
    pub fn from_indices(size: u32, lanes: u32, elements: u32, indices: &[u32]) -> Result<MatrixLayout, LayoutError> {
        let all_powers = [size, lanes, elements].iter().all(|n| n.is_power_of_two());
        if !all_powers || lanes * elements != size * size || indices.len() != (size * size) as usize {
            return Err(LayoutError::Shape { size, lanes, elements, found: indices.len() });
        }
        // The place of an element in `indices` is a number too: its low bits are those of the element, its high bits
        // those of the lane.
        let bit = |n: u32| match n.checked_sub(elements.ilog2()) {
            Some(lane_bit) => Bit::Lane(lane_bit),
            None => Bit::Element(n),
        };
        let bits = 2 * size.ilog2();
        // The bit of the place that is bit n of the index.
        let mut sources = vec![None; bits as usize];
        for n in 0..bits {
            let index = indices[1 << n];
            if !index.is_power_of_two() || index >= size * size {
                return Err(LayoutError::NotOneBit { bit: bit(n), index });
            }
            if let Some(first) = sources[index.ilog2() as usize].replace(n) {
                return Err(LayoutError::SameBit { first: bit(first), second: bit(n) });
            }
        }
        for (place, &found) in (0..).zip(indices) {
            let set = (0..bits).filter(|n| place >> n & 1 == 1);
            let expected = set.map(|n| indices[1 << n]).sum();
            if found != expected {
                let (lane, element) = (place / elements, place % elements);
                return Err(LayoutError::NotLinear { lane, element, found, expected });
            }
        }
        let mut column: Vec<Bit> = sources.into_iter().flatten().map(bit).collect();
        let row = column.split_off(size.ilog2() as usize);
        Ok(MatrixLayout { row, column })
    }

    /// A layout in which each lane's elements lie in one row, in runs of four where it has as many, beside those of its
    /// neighbours. For formats with at least as many lanes as rows.
    pub fn rows(format: MatrixFormat) -> MatrixLayout {
        let (bits, elements) = (format.size.ilog2(), format.elements().ilog2());
        let shared = bits - elements;
        let run = elements.min(2);
        let mut column: Vec<Bit> = (0..run).map(Bit::Element).collect();
        column.extend((0..shared).map(Bit::Lane));
        column.extend((run..elements).map(Bit::Element));
        MatrixLayout { row: (shared..shared + bits).map(Bit::Lane).collect(), column }
    }

    /// Row and column of an element of a lane.
    pub fn position(&self, lane: u32, element: u32) -> (u32, u32) {
        let gather = |bits: &[Bit]| {
            (0..).zip(bits).fold(0, |sum, (place, &bit)| {
                sum | match bit {
                    Bit::Lane(n) => (lane >> n & 1) << place,
                    Bit::Element(n) => (element >> n & 1) << place,
                }
            })
        };
        (gather(&self.row), gather(&self.column))
    }

    /// The bits of an element that choose its row, the one for the lowest row bit first. A lane holds elements of
    /// two to the power of their number rows.
    pub fn row_element_bits(&self) -> Vec<u32> {
        self.row.iter().filter_map(|bit| if let Bit::Element(n) = bit { Some(*n) } else { None }).collect()
    }

    /// What to add to a lane, bit by bit without carry, to reach the lanes that hold the rest of its rows, one step
    /// after the other: the `subgroupShuffleXor` steps of a sum or maximum over each row.
    pub fn row_shuffles(&self) -> Vec<u32> {
        self.column.iter().filter_map(|bit| if let Bit::Lane(n) = bit { Some(1 << n) } else { None }).collect()
    }

    /// The layout of the transposed matrix in the same lanes.
    pub fn transposed(&self) -> MatrixLayout {
        MatrixLayout { row: self.column.clone(), column: self.row.clone() }
    }
}
