//! Metadata tools: what is on a device, and how metadata gets there, along or away.

pub mod create;
pub mod device;
pub mod relocate;
pub mod signature;
