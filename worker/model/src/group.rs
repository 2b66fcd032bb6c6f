//! What a contrastive step needs from beyond its own rows, as functions that the model is given.
//!
//! A contrastive loss sees a group: this micro-batch's rows and others', on whatever worker they
//! are. The model asks for rows by their place in the group and hands gradients back the same way;
//! it never learns who holds them (DESIGN: the model knows no ranks).

/// The failure of an exchange.
pub type GroupError = Box<dyn std::error::Error + Send + Sync>;

/// A contrastive group, as one of its members sees it. Calls are collective: every member makes
/// the same calls in the same order, with its own rows.
pub trait Group {
    /// The image of every row, in the group's order: rows with the same image belong together.
    fn images(&self) -> &[u64];

    /// The place of this member's first row.
    fn first(&self) -> usize;

    /// The rows `wanted` (places in the group, any number, in this order) of a matrix of which
    /// `own` are this member's rows, `width` numbers each.
    ///
    /// # Errors
    /// Whatever kept the rows from coming.
    fn fetch(
        &mut self,
        own: &[f32],
        width: usize,
        wanted: &[usize],
    ) -> Result<Vec<f32>, GroupError>;

    /// The transpose of [`Group::fetch`]: `gradient` holds a row for each of `wanted`; returned are
    /// this member's rows of the sum of all members' gradients.
    ///
    /// # Errors
    /// Whatever kept the gradients from coming.
    fn give_back(
        &mut self,
        gradient: &[f32],
        width: usize,
        wanted: &[usize],
    ) -> Result<Vec<f32>, GroupError>;
}

/// A group of one member: the micro-batch itself.
#[derive(Clone, Debug)]
pub struct Alone {
    images: Vec<u64>,
}

impl Alone {
    /// With the image of every row.
    pub fn new(images: Vec<u64>) -> Self {
        Alone { images }
    }
}

impl Group for Alone {
    fn images(&self) -> &[u64] {
        &self.images
    }

    fn first(&self) -> usize {
        0
    }

    fn fetch(
        &mut self,
        own: &[f32],
        width: usize,
        wanted: &[usize],
    ) -> Result<Vec<f32>, GroupError> {
        let row = |place: &usize| &own[place * width..][..width];
        Ok(wanted.iter().flat_map(row).copied().collect())
    }

    fn give_back(
        &mut self,
        gradient: &[f32],
        width: usize,
        wanted: &[usize],
    ) -> Result<Vec<f32>, GroupError> {
        let mut sum = vec![0.0; self.images.len() * width];
        add_rows(&mut sum, gradient, width, wanted);
        Ok(sum)
    }
}

/// `sum[places[k]] += rows[k]` in the order of `k`, so that the bits do not depend on threads.
pub fn add_rows(sum: &mut [f32], rows: &[f32], width: usize, places: &[usize]) {
    for (row, place) in rows.chunks(width).zip(places) {
        let sum = &mut sum[place * width..][..width];
        sum.iter_mut().zip(row).for_each(|(sum, term)| *sum += term);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alone_gives_its_own_rows_and_takes_their_gradients_back() {
        let mut alone = Alone::new(vec![5, 6, 7]);
        let own = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let wanted = [2, 0, 2];
        let rows = alone.fetch(&own, 2, &wanted).unwrap();
        assert_eq!(rows, [5.0, 6.0, 1.0, 2.0, 5.0, 6.0]);
        let sum = alone.give_back(&rows, 2, &wanted).unwrap();
        assert_eq!(sum, [1.0, 2.0, 0.0, 0.0, 10.0, 12.0]);
    }
}
