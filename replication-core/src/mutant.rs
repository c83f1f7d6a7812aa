//! Deliberate faults, to show that the checkers of the simulator see them.
//!
//! A checker that was never seen failing proves nothing. Each [`Mutant`] breaks one rule of the
//! core in one place, and a test finds the checker that notices. Only with the feature `mutants`
//! can a mutant be chosen, once for the life of a resource and through its constructor; without
//! the feature [`Chosen`] is empty, [`Chosen::is_on`] is the constant `false`, and nothing of the
//! mutants is left in the program.

use crate::gi::Comparison;
use crate::handshake::SyncDecision;
use crate::state::Conn;

/// A fault in the core. The names say what the core does instead of keeping the rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    not(feature = "mutants"),
    allow(unreachable_pub, reason = "public, as its module is, only with the feature")
)]
pub enum Mutant {
    /// AL-2: data is written while its activity-log transaction is still under way.
    SkipActivityLogWait,
    /// ACK-C: success is reported once the packet was sent, as if protocol A were configured.
    AcknowledgeEarly,
    /// ORD-1: the epoch stays open when the host has its answer.
    DropBarrier,
    /// ORD-2: a write of a later epoch does not wait for the earlier ones.
    IgnoreEpochs,
    /// DUR-3: a barrier is acknowledged without the flush.
    SkipEpochFlush,
    /// BM-3: the source clears a block when it has sent it.
    ClearOnSend,
    /// GI-1: writes are acknowledged while the new generation is on its way to the disk.
    RotateLate,
    /// ORD-7: what a lost connection had asked for is answered on the next one.
    AnswerOldConnection,
    /// DUR-4: a failed flush counts as done.
    IgnoreFailedFlush,
    /// AL-3: extents leave the activity log although their bits are not durable.
    EvictWithoutBitmap,
    /// AL-3: extents leave the activity log although their data is not durable.
    EvictWithoutFlush,
    /// RS-4: the resync ends with a block left.
    FinishBeforeLastBlock,
    /// BM-5: a neg-ack marks nothing.
    IgnoreNegAck,
    /// AL-7: the activity log forgets a write when the host has its answer.
    ReleaseLogAtAnswer,
    /// BM-1: cleared bits go to the disk before the data that they stand for.
    SaveBitmapWithoutFlush,
    /// ACK-1: what the lost peer had not confirmed is not marked.
    ForgetUnconfirmed,
    /// RD-2: a node whose disk is Inconsistent reads marked blocks from it.
    ReadMarkedBlocks,
    /// ORD-6: the host gets its memory back while a packet still needs it.
    ReturnMemoryEarly,
    /// AL-10: the superblock does not say that the node is Primary.
    ForgetPrimaryFlag,
    /// RS-2: what the peer and resync write does not wait for writes on the same blocks.
    IgnoreConflicts,
    /// GI-8: the target is UpToDate in the generation that it had before.
    KeepOldGeneration,
    /// ACK-A: protocol A reports success before the system has accepted the packet.
    AnswerUnsent,
    /// DUR-2: a write that has to be durable goes to the disk as any other.
    DropFua,
    /// RD-4: a read that the peer has refused counts as done.
    BelieveFailedRead,
    /// RD-5: reads make their extents hot.
    LogReads,
    /// AL-5: after a crash the activity log is not looked at.
    SkipLogReplay,
    /// AL-9: the superblock does not say that the activity log is off.
    ForgetLogIsOff,
    /// BM-4: what is marked between the bitmaps and the resync is not announced.
    SkipNotices,
    /// BM-6: what is written between the bitmaps and the resync is not marked.
    SlipThrough,
    /// BM-8: the new part of a device that has grown counts as equal.
    GrowUnmarked,
    /// GI-6: of two histories the one of the node that decides ties is taken.
    MergeSplitBrain,
    /// GI-7: a resync of whose start the target never heard leads to a full sync.
    ForgetLostStart,
    /// GI-10: the attach does not see that the node was Primary.
    ForgetCrash,
    /// ST-3: the peer does not hear of a changed role.
    HideRole,
    /// ST-4: a question of the peer is answered in the middle of an own one.
    AgreeMeanwhile,
    /// ST-7: a refused promotion has begun a generation.
    RefuseTooLate,
    /// RS-5: a block that the source could not read counts as copied.
    ClearFailedBlocks,
    /// MD-4: a failed write of metadata counts as done.
    IgnoreFailedMetadata,
    /// WP-2: any answer to the challenge will do.
    TrustAnybody,
    /// WP-4: what lies behind the end of the device is taken for a part of it.
    TrustOffsets,
    /// WP-7: of two crossed connections each node keeps its own.
    KeepOwnDial,
    /// LV-5: a forced detach waits for the disk.
    WaitForHungDisk,
    /// FE-1: a node exposes what its own disk holds.
    ExposeOwnSize,
    /// ACK-2: what was written to a disk that is no good copy counts.
    CountBadCopy,
    /// DUR-5: what only the peer has is done, although the peer may not know that.
    TrustUnawarePeer,
    /// ORD-3: a barrier is acknowledged with one write too many.
    MiscountEpoch,
    /// RD-3: a local read error is the host's.
    KeepReadError,
    /// AL-4: a transaction that could not be written counts as written.
    WriteAfterFailedLog,
    /// GI-4: a bitmap counts whatever generation it belongs to.
    TrustOldBitmap,
    /// GI-5: data without a common past is taken for older or newer.
    AcceptUnrelated,
    /// ST-1: two Primaries are allowed.
    AllowTwoPrimaries,
    /// ST-5: nothing speaks against a promotion.
    PromoteAnything,
    /// MD-2: metadata that does not fit the device is used.
    AcceptForeignMetadata,
    /// WP-6: a peer that does not answer is asked again.
    WaitForEver,
    /// WP-8: options of the peer that do not fit are ignored.
    IgnoreOptions,
}

/// The mutant that a resource runs with, if any.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Chosen {
    #[cfg(feature = "mutants")]
    mutant: Option<Mutant>,
}

#[cfg(feature = "mutants")]
impl Chosen {
    pub(crate) const fn new(mutant: Mutant) -> Self {
        Self { mutant: Some(mutant) }
    }

    /// Whether the core breaks this rule.
    pub(crate) fn is_on(self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }
}

#[cfg(not(feature = "mutants"))]
impl Chosen {
    /// Whether the core breaks this rule: never.
    #[allow(clippy::unused_self, reason = "the same call with and without the feature")]
    pub(crate) const fn is_on(self, _mutant: Mutant) -> bool {
        false
    }
}

/// A split brain that nobody hears of: everything is copied from one of the nodes.
pub(crate) const fn merge(comparison: Comparison, own_wins: bool) -> SyncDecision {
    let conn = if own_wins { Conn::WFBitMapS } else { Conn::WFBitMapT };
    let (full, solved, demote_first, overwrites_primary) = (true, None, false, false);
    SyncDecision { conn, full, comparison, solved, demote_first, overwrites_primary }
}
