//! Metadata tools: what is on a device, and how metadata gets there or away.

pub mod create;
pub mod device;
pub mod signature;
