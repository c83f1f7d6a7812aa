//! How states are shown: plain text, JSON, single words. Section 9 of the notes on the user's
//! surface has the layouts; monitoring tools match the words, so none may change.

pub mod json;
pub mod progress;
pub mod text;
pub mod words;
