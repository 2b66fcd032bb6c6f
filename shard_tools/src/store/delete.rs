//! Removal of an object.

use object_store::ObjectStoreExt as _;

use super::{Root, StoreError};

impl Root {
    /// Removes the object; that it is gone already is no error.
    ///
    /// # Errors
    /// [`StoreError`], naming the key.
    pub async fn delete(&self, relative: &str) -> Result<(), StoreError> {
        match self.store.delete(&self.path(relative)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(self.named(relative, e)),
        }
    }
}
