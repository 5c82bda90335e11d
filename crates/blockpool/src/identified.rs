//! Finding by id and by name what a mount shows, and giving a name to another object in one step.

use crate::catalog::{Entry, EntryKind, ObjectId};
use crate::error::{PoolError, Result};
use crate::name::Name;
use crate::namespace::Listed;
use crate::object::Object;
use crate::operation::Operation;
use crate::pool::Pool;

impl ObjectId {
    /// The number, which is at least 1 and below 2^48.
    #[must_use]
    pub fn get(self) -> u64 {
        self.0
    }

    /// The id with that number. Whether anything has it is for the pool to say.
    #[must_use]
    pub fn from_number(number: u64) -> Self {
        Self(number)
    }
}

fn no_such(id: ObjectId) -> PoolError {
    PoolError::NotFound {
        name: format!("object {id}"),
    }
}

impl Pool {
    /// What has that name.
    ///
    /// # Errors
    ///
    /// Nothing has.
    pub fn find(&self, name: &Name) -> Result<Listed> {
        let state = self.inner.state();
        let entry = state.metadata.find(name)?;
        let id = ObjectId(entry.id);
        state.metadata.listed(entry).ok_or_else(|| no_such(id))
    }

    /// What has that id.
    ///
    /// # Errors
    ///
    /// Nothing has.
    pub fn find_id(&self, id: ObjectId) -> Result<Listed> {
        let state = self.inner.state();
        let entry: Option<&Entry> = state.metadata.catalog.get(id.0);
        entry
            .and_then(|entry| state.metadata.listed(entry))
            .ok_or_else(|| no_such(id))
    }

    /// Opens the object or snapshot with that id.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn open_id(&self, id: ObjectId) -> Result<Object> {
        let kind = {
            let state = self.inner.state();
            state.metadata.catalog.get(id.0).map(|entry| entry.kind)
        };
        match kind {
            Some(EntryKind::Object | EntryKind::Snapshot) => Ok(Object::new(self, id.0)),
            _ => Err(no_such(id)),
        }
    }

    /// Gives `old` the name `new`; what has that name gets the name `displaced`. No flush comes between the two.
    ///
    /// # Errors
    ///
    /// `old` or `new` does not exist or is no object, `displaced` exists, or the pool is out of order.
    pub fn rename_over(&self, old: &Name, new: &Name, displaced: &Name) -> Result<()> {
        let mut state = self.inner.state();
        let metadata = &state.metadata;
        let (moved, gone) = (metadata.find(old)?, metadata.find(new)?);
        let (moved, gone) = (moved.id, gone.id);
        let place = metadata.dataset(displaced)?.id;
        let parent = metadata.dataset(new)?.id;
        let text = |name: &Name| name.object().unwrap_or_default().to_owned();
        state.commit(&Operation::Rename {
            id: gone,
            parent: place,
            name: text(displaced),
        })?;
        state.commit(&Operation::Rename {
            id: moved,
            parent,
            name: text(new),
        })
    }
}
