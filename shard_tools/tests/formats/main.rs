//! Every format: fixtures in the publisher's schema with one broken record each are packed, verified
//! and read back.

mod captions;
mod fixture;
mod golden;
mod pixels;
mod tars;
mod tasks;
