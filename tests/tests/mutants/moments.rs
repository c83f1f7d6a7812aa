//! Scripts that go for one invariant each, named after it. Chance decides on the circumstances.

use replication_core::config::{Authentication, OnIoError};
use replication_core::control::Command;
use replication_core::event::{Event, HostOp};
use replication_core::state::{Conn, Disk, Role};
use replication_core::units::{Errno, Sector, SectorRange, Span, VolumeNr};
use replication_core::wire::{
    BlockId, BlockRequest, DataHeader, Desc, HmacAlg, Packet, ReplicationProtocol,
};
use tests::sim::disk::{Cut, Fault, Kind, Trouble};
use tests::sim::rng::Rng;
use tests::sim::setup::MIB;
use tests::sim::{A, B, Load, Setup, World};

use crate::common::{Workload, area, ask_for_write, heavy, runs, trouble, wait_alone};

/// Long enough for whatever happens without waiting for anybody.
const SOON: Span = Span::from_ms(300);
/// Extents of the large device, and sectors of each.
const EXTENTS: u64 = 19;
const EXTENT: u64 = 8192;

runs! {
    ACK_A, protocol_a, ack_a;
    ACK_B, protocol_b, ack_b;
    ACK_2, slow, ack_2;
    DUR_2, plain, dur_2;
    DUR_5, plain, dur_5;
    RD_3, any_error, rd_3;
    RD_4, passes_errors_on, rd_4;
    RD_5, large, rd_5;
    AL_4, plain, al_4;
    AL_9, any_log, al_9;
    BM_8, any_metadata, bm_8;
    GI_6, plain, gi_6;
    GI_7, plain, gi_7;
    GI_10, large, gi_10;
    ST_3, jittery, st_3;
    ST_4, jittery, st_4;
    ST_7, plain, st_7;
    RS_5, passes_errors_on, rs_5;
    MD_4, plain, md_4;
    WP_2, two_secrets, wp_2;
    WP_4, plain, wp_4;
    WP_6, patient, wp_6;
    WP_7, jittery, wp_7;
    LV_5, plain, lv_5;
    FE_1, two_sizes, fe_1;
}

fn plain(_: &mut Setup, _: &mut Rng) {}

fn jittery(setup: &mut Setup, rng: &mut Rng) {
    setup.speed.jitter = Span(rng.between(1_000, 3_000_000));
}

fn protocol_a(setup: &mut Setup, _: &mut Rng) {
    setup.protocol(ReplicationProtocol::A);
    setup.speed.window = 4096;
}

fn protocol_b(setup: &mut Setup, _: &mut Rng) {
    setup.protocol(ReplicationProtocol::B);
}

fn any_error(setup: &mut Setup, rng: &mut Rng) {
    let policies = [OnIoError::Detach, OnIoError::PassOn, OnIoError::CallLocalIoError];
    let policy = policies[usize::try_from(rng.below(3)).expect("small")];
    setup.disk(|disk| disk.on_io_error = policy);
}

fn slow(setup: &mut Setup, _: &mut Rng) {
    setup.disk(|disk| disk.rate.max_rate_kib = 400);
}

/// Nothing but pings finds out that the peer is gone.
fn patient(setup: &mut Setup, _: &mut Rng) {
    setup.net(|net| net.ko_count = 0);
}

fn passes_errors_on(setup: &mut Setup, _: &mut Rng) {
    setup.disk(|disk| disk.on_io_error = OnIoError::PassOn);
}

fn large(setup: &mut Setup, rng: &mut Rng) {
    setup.size(80 * MIB);
    setup.external_meta(2048);
    let slots = u16::try_from(rng.between(2, 16)).expect("small");
    setup.disk(|disk| disk.al_extents = slots);
}

fn any_log(setup: &mut Setup, rng: &mut Rng) {
    large(setup, rng);
    setup.size(6 * EXTENT);
    let updates = rng.chance(70);
    setup.disk(|disk| disk.al_updates = updates);
}

fn any_metadata(setup: &mut Setup, rng: &mut Rng) {
    if rng.chance(50) {
        setup.external_meta(2048);
    }
}

fn two_secrets(setup: &mut Setup, rng: &mut Rng) {
    let auth = |secret: &str| Authentication { alg: HmacAlg::Sha1, secret: String::from(secret) };
    setup.nodes[A].config.net.auth = Some(auth("mellon"));
    setup.nodes[B].config.net.auth = Some(auth(if rng.chance(50) { "melon" } else { "mellonn" }));
}

fn two_sizes(setup: &mut Setup, rng: &mut Rng) {
    let larger = if rng.chance(50) { A } else { B };
    setup.nodes[larger].devices[0].data = rng.between(9, 20) * MIB;
}

fn wide_areas(extents: u64) -> Vec<SectorRange> {
    (0..extents).map(|extent| area(extent * EXTENT, 64)).collect()
}

fn answered(w: &mut World, number: u64) {
    w.run_until("the answer", Span::from_secs(30), |w| w.answer(A, number).is_some());
    assert_eq!(w.answer(A, number), Some(Ok(())));
}

fn must_wait(w: &mut World, number: u64, why: &str) {
    w.run_for(SOON);
    assert!(w.answer(A, number).is_none(), "{why}");
}

/// The peer's host has gone and its process as well, with or without its power.
fn lose(w: &mut World, rng: &mut Rng, n: usize) {
    if rng.chance(50) {
        w.kill(n);
    } else {
        w.power_cut(n, Cut::LoseAll);
    }
}

/// Packets that the system does not accept, and a local disk that does not answer.
fn ack_a(w: &mut World, _: &mut Rng) {
    w.start_synced();
    w.cut();
    let data = ask_for_write(w, area(0, 64));
    let zeroes = HostOp::WriteZeroes { unmap: false };
    let zeroes = w.submit(A, 0, zeroes, area(1000, 64)).expect("a free slot");
    must_wait(w, data, "ACK-A: success before the packet was accepted");
    assert!(w.answer(A, zeroes).is_none(), "ACK-A: success before the packet was accepted");
    w.heal();
    answered(w, data);
    answered(w, zeroes);
    w.settle();
    w.check_synced();
    trouble(w, A, Kind::Write, Some(1), true);
    let write = ask_for_write(w, area(40, 8));
    must_wait(w, write, "ACK-A: success before the local write has finished");
    w.heal_disks(A);
    answered(w, write);
    w.wait_synced();
}

/// The word of the peer does not come; then it comes although its disk does not answer.
fn ack_b(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    w.net.cut_towards(A);
    let range = area(rng.below(100) * 8, 16);
    let write = ask_for_write(w, range);
    must_wait(w, write, "ACK-B: success before the peer has confirmed that it has the data");
    if rng.chance(50) {
        lose(w, rng, B);
        w.heal();
        answered(w, write);
        wait_alone(w, A);
        w.settle();
        w.check_quiet();
        w.restart(B);
    } else {
        w.heal();
        answered(w, write);
    }
    w.wait_synced();
    trouble(w, B, Kind::Write, Some(1), true);
    let write = ask_for_write(w, area(2000, 8));
    w.run_for(SOON);
    assert_eq!(w.answer(A, write), Some(Ok(())), "ACK-B: waits for the disk of the peer");
    w.heal_disks(B);
    w.wait_synced();
    w.read_all(A, 0);
}

/// A Primary that is the target of a resync has a write under way as it loses its source.
fn ack_2(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    w.write(A, 0, 0, 64);
    w.must(A, Command::Invalidate(None));
    w.since_sync[0].troubled = true;
    w.run_until("the resync runs", Span::from_secs(5), |w| w.conn(A) == Conn::SyncTarget);
    w.run_for(Span(rng.below(20_000_000)));
    w.cut();
    let write = ask_for_write(w, area(rng.below(100) * 8, 16));
    wait_alone(w, A);
    w.run_until("the answer", Span::from_secs(5), |w| w.answer(A, write).is_some());
    let result = w.answer(A, write);
    assert!(result.is_some_and(|r| r.is_err()), "ACK-2: no good copy has it, but: {result:?}");
    w.heal();
    w.wait_synced();
    w.read_all(A, 0);
}

/// A write with FUA among others, then the power fails.
fn dur_2(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    let is_alone = rng.chance(50);
    if is_alone {
        w.kill(B);
        wait_alone(w, A);
        w.settle();
    }
    w.write(A, 0, 0, 64);
    let range = area(rng.below(8) * 8, 16);
    assert_eq!(w.request(A, 0, HostOp::Write { fua: true }, range), Ok(()));
    let disk = &w.nodes[A].backing[0].data;
    let lost = (range.start..range.end).find(|sector| !disk.is_durable(*sector));
    assert!(lost.is_none(), "DUR-2: {range} was to be durable, sector {lost:?} is not");
    w.power_cut(A, Cut::LoseAll);
    w.restart(A);
    if is_alone {
        w.restart(B);
    }
    w.wait_synced();
    w.must(A, Command::Primary { force: false });
    w.read_all(A, 0);
}

/// A Primary's disk fails over a flush, which its peer does not hear of, and the power is lost.
fn dur_5(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    w.write(A, 0, rng.below(64), 8);
    w.settle();
    trouble(w, A, Kind::Flush, Some(1), false);
    w.net.cut_towards(B);
    w.submit(A, 0, HostOp::Flush, SectorRange::default()).expect("a slot is free");
    w.run_for(SOON);
    w.power_cut(A, Cut::LoseAll);
    w.heal();
    w.restart(A);
    w.wait_synced();
    w.must(A, Command::Primary { force: false });
    w.read_all(A, 0);
}

/// A read fails here, and the peer has the data.
fn rd_3(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    w.write(A, 0, 0, 128);
    trouble(w, A, Kind::Read, Some(1), false);
    let range = area(rng.below(8) * 8, 16);
    let result = w.request(A, 0, HostOp::Read, range);
    assert!(result.is_ok(), "RD-3: the peer has {range}, but: {result:?}");
    w.read_all(A, 0);
}

/// A Primary without a disk: its peer cannot read, does not answer, or answers with too little.
fn rd_4(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    w.write(A, 0, 0, 128);
    w.must(A, Command::Detach { volume: None, force: false });
    w.disk_failed(A, 0);
    w.settle();
    trouble(w, B, Kind::Read, Some(1), false);
    let result = w.request(A, 0, HostOp::Read, area(rng.below(8) * 8, 16));
    assert!(result.is_err(), "RD-4: the peer could not read, nobody else has it: {result:?}");
    w.read(A, 0, 0, 128);
    w.settle();
    trouble(w, B, Kind::Read, Some(1), true);
    let read = w.submit(A, 0, HostOp::Read, area(0, 64)).expect("a free slot");
    w.run_for(Span::from_ms(20));
    if rng.chance(50) {
        w.cut();
    } else {
        answer_short(w, read);
    }
    wait_alone(w, A);
    w.run_until("the answer", Span::from_secs(30), |w| w.answer(A, read).is_some());
    let result = w.answer(A, read);
    assert!(result.is_some_and(|r| r.is_err()), "RD-4: no answer of the peer counts: {result:?}");
    w.heal();
    w.heal_disks(B);
    w.wait_connected();
    w.read(A, 0, 0, 128);
    w.must(A, Command::Attach(None));
    w.wait_synced();
    w.read_all(A, 0);
}

/// A sector comes for an answer of many.
fn answer_short(w: &mut World, read: u64) {
    let asked = w.trace.lines().filter(|line| line.contains("> P_DATA_REQUEST")).last();
    let id = asked.and_then(|line| line.split("id=0x").nth(1)?.split(' ').next());
    let id = id.and_then(|id| u64::from_str_radix(id, 16).ok()).expect("a read from the peer");
    let header =
        DataHeader { sector: Sector(0), block_id: BlockId(id), len: 512, ..DataHeader::default() };
    let sock = data_sock(w, A);
    let resource = w.nodes[A].resource.as_mut().expect("it runs");
    let packet = Packet::DataReply(header);
    let payload = resource.payload_buffer(&packet);
    w.handle(A, Event::Packet { sock, volume: VolumeNr(0), packet, payload });
    assert!(w.conn(A) < Conn::Connected, "RD-4: a sector is no answer to read {read}");
}

fn data_sock(w: &World, n: usize) -> replication_core::event::SockId {
    let socks = w.net.open_socks(n);
    let of_data = socks.into_iter().min_by_key(|sock| w.net.find(n, *sock));
    of_data.expect("it is connected")
}

/// Reads of what is and is not in the log, with and without a peer.
fn rd_5(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    w.start_load(A, heavy(wide_areas(EXTENTS)));
    w.run_for(Span::from_ms(rng.between(1, 30)));
    w.drain(A);
    match rng.below(3) {
        0 => {}
        1 => {
            w.kill(B);
            wait_alone(w, A);
            w.write(A, 0, 0, 8);
        }
        _ => {
            w.must(A, Command::Detach { volume: None, force: false });
            w.disk_failed(A, 0);
        }
    }
    w.settle();
    w.run_for(Span::from_secs(1));
    let before = [A, B].map(|n| w.knowledge(n, 0));
    w.start_load(A, Load { reads: 100, ..heavy(vec![area(0, EXTENTS * EXTENT)]) });
    w.run_for(Span::from_ms(50));
    w.drain(A);
    w.settle();
    w.run_for(Span::from_secs(1));
    for n in [A, B] {
        let after = w.knowledge(n, 0);
        assert!(after == before[n], "RD-5: reads made {:?} of node {n} {after:?}", before[n]);
    }
}

/// Without its peer, a Primary cannot write its log.
fn al_4(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    w.kill(B);
    wait_alone(w, A);
    w.settle();
    trouble(w, A, Kind::MetaWrite, Some(1), false);
    let range = area(rng.below(1000) * 8, 16);
    let result = w.request(A, 0, HostOp::Write { fua: false }, range);
    let disk = &w.nodes[A].backing[0].data;
    let written = (range.start..range.end).find(|s| disk.sector(*s).iter().any(|b| *b != 0));
    assert!(written.is_none(), "AL-4: {range} went to the disk of a failed log");
    assert!(result.is_err(), "AL-4: the log could not be written, but: {result:?}");
    w.must(A, Command::Attach(None));
    w.restart(B);
    w.wait_synced();
}

/// The Primary dies, comes back with a log of another size or none, and dies again.
fn al_9(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    for _ in 0..2 {
        w.start_load(A, heavy(wide_areas(6)));
        w.run_for(Span::from_ms(rng.between(1, 60)));
        lose(w, rng, A);
        let slots = u16::try_from(rng.between(2, 8)).expect("small");
        let updates = rng.chance(70);
        let disk = &mut w.nodes[A].setup.config.volumes[0].disk;
        (disk.al_extents, disk.al_updates) = (slots, updates);
        if rng.chance(50) {
            // ... and in the middle of its recovery.
            w.boot(A);
            w.tell(A, Command::Up);
            w.run_for(Span(rng.between(100_000, 10_000_000)));
            lose(w, rng, A);
        }
        w.restart(A);
        w.wait_synced();
        w.must(A, Command::Primary { force: false });
    }
    w.read_all(A, 0);
}

/// Devices with different contents behind the end of the volume grow.
fn bm_8(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    w.write(A, 0, 0, 64);
    w.settle();
    let old = w.nodes[A].sizes[0];
    // Metadata at the end of a device that grows unseen would not be found.
    let is_parted = w.nodes[B].backing[0].meta.is_some() && rng.chance(50);
    if is_parted {
        w.must(B, Command::Disconnect { force: false });
        wait_alone(w, A);
    }
    for n in [A, B] {
        w.nodes[n].backing[0].data.grow(12 * MIB);
    }
    for _ in 0..5 {
        let at = 8 * MIB + rng.below(3 * MIB);
        w.nodes[B].backing[0].data.write(at, &[0x77; 4096], true);
    }
    let resize = |assume_peer_has_space| Command::Resize {
        volume: None,
        size: None,
        assume_clean: false,
        assume_peer_has_space,
    };
    w.must(A, resize(is_parted));
    if is_parted {
        w.write(A, 0, 11 * MIB, 64);
        w.must(B, Command::Detach { volume: None, force: false });
        w.disk_failed(B, 0);
        w.must(B, Command::Attach(None));
        w.must(B, Command::Connect { discard_my_data: false });
    }
    let limit = Span::from_secs(60);
    w.run_until("the new size", limit, |w| [A, B].iter().all(|n| w.nodes[*n].sizes[0] > old));
    w.write(A, 0, 10 * MIB, 64);
    w.wait_synced();
    w.check_equal(0);
    w.read_all(A, 0);
}

/// Both nodes write alone and meet, as Secondaries or not.
fn gi_6(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    w.cut();
    for n in [A, B] {
        wait_alone(w, n);
    }
    w.must(B, Command::Primary { force: false });
    for n in [A, B] {
        w.write(n, 0, rng.below(100) * 8, 8);
    }
    let stays = rng.below(3);
    for n in [A, B].into_iter().filter(|n| *n as u64 != stays) {
        w.must(n, Command::Secondary { holder: None });
    }
    w.settle();
    let before = [A, B].map(|n| w.status(n).volumes[0].uuids);
    w.heal();
    w.run_until("GI-6: both find the split brain", Span::from_secs(30), |w| {
        [A, B].iter().all(|n| w.conn(*n) == Conn::StandAlone)
    });
    for n in [A, B] {
        assert!(w.has_logged(n, "Split-Brain detected"), "GI-6: node {n} says so");
        assert_eq!(w.status(n).volumes[0].uuids, before[n], "GI-6: nothing has changed on {n}");
        let written = w.status(n).volumes[0].received_kib;
        assert_eq!(written, 0, "GI-6: node {n} has taken data of the other one");
    }
}

/// The link is cut as a resync begins, on either side of its start.
fn gi_7(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    w.cut();
    for n in [A, B] {
        wait_alone(w, n);
    }
    for at in 0..4 {
        w.write(A, 0, at * 640, 8);
    }
    for _ in 0..3 {
        w.settle();
        w.heal();
        w.run_until("the bitmaps", Span::from_secs(60), |w| w.conn(A) == Conn::WFBitMapS);
        w.run_for(Span(rng.between(0, 8_000_000)));
        w.cut();
        for n in [A, B] {
            wait_alone(w, n);
        }
        w.settle();
        w.check_quiet();
    }
    w.write(A, 0, 1000, 8);
    w.heal();
    w.wait_synced();
    let copied = w.status(B).volumes[0].received_kib;
    assert!(copied <= 200, "GI-7: {copied} KiB were copied for 20 KiB, and not more than 3 times");
    w.check_same_generation(0);
    w.read_all(A, 0);
}

/// A Primary that wrote what its peer did not get dies and comes back.
fn gi_10(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    w.start_load(A, heavy(wide_areas(EXTENTS)));
    w.run_for(Span::from_ms(rng.between(5, 60)));
    lose(w, rng, A);
    wait_alone(w, B);
    let slots = w.nodes[A].setup.config.volumes[0].disk.al_extents;
    w.restart(A);
    w.run_until("they are connected", Span::from_secs(60), |w| {
        w.all(|s| s.conn >= Conn::Connected)
    });
    let state = w.state(A, 0);
    let by_marks = w.has_logged(A, "both disks are of one generation");
    assert!(
        matches!(state.conn, Conn::WFBitMapS | Conn::SyncSource) && !by_marks,
        "GI-10: a Primary that has crashed is the source of what may differ, but: {state}"
    );
    w.wait_synced();
    let copied = w.status(B).volumes[0].received_kib;
    let most = (u64::from(slots) + 1) * 4096 + 1024;
    assert!(copied <= most, "GI-10: {copied} KiB were copied, the log covers {most}");
}

/// The role moves; whatever is at rest is known to both.
fn st_3(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    let mut primary = A;
    for _ in 0..3 {
        w.must(primary, Command::Secondary { holder: None });
        w.settle();
        w.check_synced();
        if rng.chance(50) {
            primary = 1 - primary;
        }
        w.must(primary, Command::Primary { force: false });
        w.settle();
        w.check_synced();
    }
}

/// Both operators promote at the same time.
fn st_4(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    w.must(A, Command::Secondary { holder: None });
    w.settle();
    for _ in 0..3 {
        let (first, second) = if rng.chance(50) { (A, B) } else { (B, A) };
        let asked = [first, second].map(|n| {
            let id = w.tell(n, Command::Primary { force: false });
            let pause = rng.below(2_000_000);
            w.run_for(Span(pause));
            (n, id)
        });
        w.run_until("ST-4: both are answered", Span::from_secs(30), |w| {
            asked.iter().all(|(n, id)| w.reply(*n, *id).is_some())
        });
        let won: Vec<usize> = asked
            .iter()
            .filter(|(n, id)| w.reply(*n, *id).is_some_and(|reply| reply.is_ok()))
            .map(|(n, _)| *n)
            .collect();
        assert_eq!(won.len(), 1, "ST-4: of two promotions at once, those of {won:?} succeeded");
        w.settle();
        w.check_synced();
        w.must(won[0], Command::Secondary { holder: None });
        w.settle();
    }
}

/// Commands that a rule forbids.
fn st_7(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    w.write(A, 0, rng.below(100) * 8, 8);
    w.settle();
    let refused = |w: &mut World, n: usize, command: Command| {
        let before = w.knowledge(n, 0);
        let words = format!("{command:?}");
        w.must_not(n, command);
        let after = w.knowledge(n, 0);
        assert!(after == before, "ST-7: {words} was refused, but made {before:?} {after:?}");
    };
    for n in [A, B] {
        refused(w, n, Command::Attach(None));
        refused(w, n, Command::Connect { discard_my_data: false });
        refused(w, n, Command::NewCurrentUuid { volume: None, clear_bitmap: true });
        refused(w, n, Command::PauseSync(false));
    }
    refused(w, A, Command::Outdate);
    refused(w, B, Command::Primary { force: false });
    w.must(B, Command::Disconnect { force: false });
    wait_alone(w, A);
    w.settle();
    refused(w, A, Command::Invalidate(None));
    refused(w, A, Command::InvalidateRemote(None));
    w.must(B, Command::Outdate);
    w.settle();
    refused(w, B, Command::Primary { force: false });
    refused(w, B, Command::NewCurrentUuid { volume: None, clear_bitmap: false });
    w.must(B, Command::Connect { discard_my_data: false });
    w.wait_synced();
}

/// A block that the source of a resync cannot read.
fn rs_5(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    w.cut();
    for n in [A, B] {
        wait_alone(w, n);
    }
    let bad = area(rng.below(16) * 8, 8);
    w.write(A, 0, 0, 128);
    w.settle();
    let trouble = Trouble::Fail(Errno::EIO);
    let fault = Fault { kind: Kind::Read, range: Some(bad), times: None, trouble };
    w.nodes[A].backing[0].data.add_fault(fault);
    w.heal();
    let limit = Span::from_secs(60);
    w.run_until("the resync runs", limit, |w| w.conn(B) == Conn::SyncTarget);
    w.run_until("its end", limit, |w| w.conn(B) != Conn::SyncTarget);
    let (state, left) = (w.state(B, 0), w.differing[0].clone());
    assert!(!left.is_empty(), "RS-5: {bad} could not be read, and yet it is copied");
    assert_ne!(state.disk, Disk::UpToDate, "RS-5: {left:?} differ, but the target is {state}");
    for n in [A, B] {
        let forgotten = left.iter().find(|block| !w.is_marked(n, 0, **block));
        assert!(forgotten.is_none(), "RS-5: node {n} has forgotten block {forgotten:?}");
        assert!(w.has_logged(n, "failed"), "RS-5: node {n} says so");
    }
    w.heal_disks(A);
    w.must(B, Command::Disconnect { force: false });
    wait_alone(w, A);
    w.must(B, Command::Connect { discard_my_data: false });
    w.wait_synced();
    w.read_all(A, 0);
}

/// A write of metadata fails: of the superblock, the bitmap, or the activity log.
fn md_4(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    match rng.below(3) {
        0 => {
            trouble(w, A, Kind::MetaWrite, Some(1), false);
            w.must(A, Command::Secondary { holder: None });
        }
        1 => {
            trouble(w, A, Kind::MetaWrite, Some(1), false);
            w.kill(B);
        }
        _ => {
            w.kill(B);
            wait_alone(w, A);
            w.write(A, 0, 0, 64);
            w.settle();
            trouble(w, A, Kind::MetaWrite, Some(1), false);
            w.tell(A, Command::Secondary { holder: None });
        }
    }
    let is_failed = |w: &mut World| w.state(A, 0).disk <= Disk::Failed;
    w.run_until("MD-4: the disk is given up", Span::from_secs(10), is_failed);
}

/// The secrets differ.
fn wp_2(w: &mut World, _: &mut Rng) {
    for n in [A, B] {
        w.boot(n);
        w.must(n, Command::Up);
    }
    w.settle();
    let before = [A, B].map(|n| w.knowledge(n, 0));
    let limit = Span::from_secs(20);
    w.run_until("WP-2: both refuse each other", limit, |w| w.all(|s| s.conn == Conn::StandAlone));
    for n in [A, B] {
        assert!(w.has_logged(n, "Authentication of peer failed"), "WP-2: node {n} says so");
        let (before, after) = (before[n], w.knowledge(n, 0));
        assert_eq!(before.on_disk, after.on_disk, "WP-2: the metadata of node {n} has changed");
        let disk = after.in_memory.map(|(state, _, _)| state.disk);
        assert_eq!(disk, Some(Disk::Inconsistent), "WP-2: the disk of node {n}");
    }
    assert_eq!(w.packets_sent("P_UUIDS"), 0, "WP-2: a stranger was told of generations");
}

/// What lies behind the end of the device, asked for in every way.
fn wp_4(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    w.write(A, 0, 0, 8);
    w.settle();
    let size = w.nodes[A].sizes[0];
    let sector = Sector(size - size % 8 - if rng.chance(50) { 0 } else { 8 });
    let bytes = 8192;
    let block = BlockRequest { sector, block_id: BlockId::SYNCER, size: bytes };
    let packet = match rng.below(3) {
        0 => Packet::RsDataRequest(block),
        1 => Packet::DataRequest(block),
        _ => Packet::OutOfSync(Desc { sector, size: bytes }),
    };
    let words = packet.name();
    let sock = data_sock(w, A);
    w.handle(A, Event::Packet { sock, volume: VolumeNr(0), packet, payload: None });
    let is_refused = w.conn(A) < Conn::Connected && w.has_logged(A, "broke the protocol");
    assert!(is_refused, "WP-4: {words} of {bytes} bytes at {sector} of {size} is taken");
    w.wait_synced();
}

/// The link goes dead under a write; only pings can tell.
fn wp_6(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    w.run_for(Span(rng.below(3_000_000_000)));
    let towards = [vec![A], vec![B], vec![A, B]];
    for n in &towards[usize::try_from(rng.below(3)).expect("small")] {
        w.net.cut_towards(*n);
    }
    let write = ask_for_write(w, area(rng.below(100) * 8, 16));
    let net = &w.nodes[A].setup.config.net;
    let bound = Span(net.ping_int.0 + net.ping_timeout.0 + SOON.0);
    let what = "WP-6: the host is not kept waiting longer than for a ping";
    w.run_until(what, bound, |w| w.answer(A, write).is_some());
    assert_eq!(w.answer(A, write), Some(Ok(())));
    w.heal();
    w.wait_synced();
    w.read_all(A, 0);
}

/// Both nodes dial at the same time, then, after each loss, as chance will have it: an attempt that
/// comes before the other node listens is made again after `connect-int`.
fn wp_7(w: &mut World, rng: &mut Rng) {
    for n in [A, B] {
        w.boot(n);
        w.must(n, Command::Attach(None));
    }
    for n in [A, B] {
        w.tell(n, Command::Connect { discard_my_data: false });
        // Less than a packet takes: both listen before they are dialed.
        w.run_for(Span(rng.below(50_000)));
    }
    for limit in [2_500, 8_000, 8_000, 8_000] {
        let limit = Span::from_ms(limit);
        w.run_until("WP-7: one pair of sockets", limit, |w| w.all(|s| s.conn >= Conn::Connected));
        w.run_for(SOON);
        for n in [A, B] {
            let socks = w.net.open_socks(n).len();
            assert_eq!(socks, 2, "WP-7: node {n} has {socks} sockets");
        }
        w.net.reset_all(w.now);
        w.run_until("the loss", Span::from_secs(5), |w| w.all(|s| s.conn < Conn::Connected));
    }
}

/// The disk of a Primary hangs, with writes on it and metadata, and is given up.
fn lv_5(w: &mut World, rng: &mut Rng) {
    w.start_synced();
    let kind = if rng.chance(50) { Kind::Write } else { Kind::MetaWrite };
    trouble(w, A, kind, None, true);
    let write = ask_for_write(w, area(rng.below(100) * 8, 16));
    w.run_for(SOON);
    let patient = w.tell(A, Command::Detach { volume: None, force: false });
    w.run_for(Span::from_secs(1));
    assert!(w.reply(A, patient).is_none(), "a detach waits for the disk");
    let forced = w.tell(A, Command::Detach { volume: None, force: true });
    w.run_until("LV-5: the forced detach returns", Span::from_secs(10), |w| {
        w.reply(A, forced).is_some() && w.reply(A, patient).is_some()
    });
    assert!(w.reply(A, forced).is_some_and(|reply| reply.is_ok()), "LV-5: it is done");
    assert!(w.state(A, 0).disk <= Disk::Failed, "LV-5: the disk is not used any more");
    // The peer's disk serves.
    w.write(A, 0, 4000, 8);
    w.read(A, 0, 4000, 8);
    w.heal_disks(A);
    w.run_until("the disk is put away", Span::from_secs(10), |w| {
        w.state(A, 0).disk == Disk::Diskless && w.answer(A, write).is_some()
    });
    assert_eq!(w.answer(A, write), Some(Ok(())));
    w.must(A, Command::Attach(None));
    w.wait_synced();
    w.read_all(A, 0);
}

/// Devices of different size; then the smaller one grows, and nobody asks for more.
fn fe_1(w: &mut World, rng: &mut Rng) {
    for n in [A, B] {
        w.boot(n);
        w.must(n, Command::Up);
    }
    w.run_for(Span::from_secs(5));
    let agreed = |w: &World| {
        let sizes = [A, B].map(|n| w.nodes[n].sizes[0]);
        let fits = sizes[0] > 0 && sizes[0] <= 8 * MIB;
        assert!(fits && sizes[0] == sizes[1], "FE-1: the nodes expose {sizes:?} sectors");
        sizes[0]
    };
    let size = agreed(w);
    w.must(A, Command::NewCurrentUuid { volume: None, clear_bitmap: true });
    w.wait_synced();
    w.must(A, Command::Primary { force: false });
    assert_eq!(w.state(A, 0).role, Role::Primary);
    w.write(A, 0, size - 8, 8);
    for n in [A, B] {
        w.nodes[n].backing[0].data.grow(24 * MIB);
    }
    if rng.chance(50) {
        w.net.reset_all(w.now);
        wait_alone(w, A);
    }
    w.wait_synced();
    assert_eq!(agreed(w), size, "FE-1: the size has changed by itself");
    w.read_all(A, 0);
}
