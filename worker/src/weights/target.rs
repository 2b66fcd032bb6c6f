//! What is to be filled: names and shapes in name order, and so places in a flat vector.

use belfry_model::ParamTable;

/// One tensor of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The authors' name.
    pub name: String,
    /// Its shape there.
    pub shape: Vec<usize>,
    /// First element in the flat vector.
    pub offset: usize,
    /// Elements.
    pub len: usize,
}

/// The tensors of a model, sorted by name, without gaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Targets(Vec<Target>);

impl Targets {
    /// From names and shapes in any order.
    pub fn new(tensors: impl IntoIterator<Item = (String, Vec<usize>)>) -> Self {
        let mut tensors: Vec<(String, Vec<usize>)> = tensors.into_iter().collect();
        tensors.sort();
        let mut offset = 0;
        let target = |(name, shape): (String, Vec<usize>)| {
            let len = shape.iter().product();
            offset += len;
            Target {
                name,
                shape,
                offset: offset - len,
                len,
            }
        };
        Targets(tensors.into_iter().map(target).collect())
    }

    /// In name order.
    pub fn iter(&self) -> std::slice::Iter<'_, Target> {
        self.0.iter()
    }

    /// Elements of the flat vector.
    pub fn elements(&self) -> usize {
        self.0.last().map_or(0, |t| t.offset + t.len)
    }

    /// The tensor with this name.
    pub fn get(&self, name: &str) -> Option<&Target> {
        let place = self.0.binary_search_by(|t| t.name.as_str().cmp(name));
        place.ok().map(|i| &self.0[i])
    }
}

impl From<&ParamTable> for Targets {
    fn from(table: &ParamTable) -> Self {
        let entries = table.entries().iter();
        Targets::new(entries.map(|e| (e.name.clone(), e.shape.clone())))
    }
}
