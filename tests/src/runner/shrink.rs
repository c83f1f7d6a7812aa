//! What of a failing run is needed for it to fail? Kinds of faults are switched off, and rounds
//! left out, as long as the run fails at the same place.
//!
//! Every round has its own stream of chance, so leaving one out does not change what the others
//! want to do.

use super::worker::{End, Failure};
use crate::random::{Case, Kind, plan};

/// Runs that a search may cost.
const MOST_RUNS: u32 = 400;

struct Search<'a> {
    case: Case,
    failure: Failure,
    runs: u32,
    tell: &'a dyn Fn(&str),
}

impl Search<'_> {
    /// Takes the smaller case if it fails in the same way.
    fn attempt(&mut self, case: Case) -> anyhow::Result<bool> {
        if self.runs >= MOST_RUNS {
            return Ok(false);
        }
        self.runs += 1;
        let End::Failed(failure) = super::run_one(&mut None, &case)? else { return Ok(false) };
        if failure.place != self.failure.place {
            return Ok(false);
        }
        self.case = case;
        self.failure = failure;
        let steps = self.failure.at.steps;
        (self.tell)(&format!("shrunk to {steps} steps: {}", self.case.words()));
        Ok(true)
    }

    fn drop_kinds(&mut self) -> anyhow::Result<bool> {
        let mut shrunk = false;
        for kind in Kind::ALL.iter().copied() {
            if plan(&self.case).kinds.has(kind) {
                let mut case = self.case.clone();
                case.without.insert(kind);
                shrunk |= self.attempt(case)?;
            }
        }
        Ok(shrunk)
    }

    /// Leaves out ever smaller parts of the rounds.
    fn drop_rounds(&mut self) -> anyhow::Result<bool> {
        let mut shrunk = false;
        let mut part = self.rounds().len().div_ceil(2).max(1);
        loop {
            let mut at = 0;
            while at < self.rounds().len() {
                let mut rounds = self.rounds();
                let end = rounds.len().min(at + part);
                rounds.drain(at..end);
                let case = Case { rounds: Some(rounds), ..self.case.clone() };
                if self.attempt(case)? {
                    shrunk = true;
                } else {
                    at += part;
                }
            }
            if part == 1 {
                return Ok(shrunk);
            }
            part = part.div_ceil(2);
        }
    }

    fn rounds(&self) -> Vec<u32> {
        let all = plan(&self.case).rounds;
        self.case.rounds.clone().unwrap_or_else(|| (0..all).collect())
    }
}

/// Looks for a smaller case that fails at the same place.
pub(super) fn shrink(
    case: &Case,
    failure: &Failure,
    tell: impl Fn(&str),
) -> anyhow::Result<(Case, Failure)> {
    let (case, failure) = (case.clone(), failure.clone());
    let mut search = Search { case, failure, runs: 0, tell: &tell };
    while search.drop_rounds()? | search.drop_kinds()? {}
    tell(&format!("shrinking took {} runs", search.runs));
    Ok((search.case, search.failure))
}
