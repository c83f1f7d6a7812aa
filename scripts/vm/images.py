"""Guest images: Debian kernels and one Debian root, fetched by apt and cached.

Nothing here needs root, loop devices or a chroot: packages are resolved by a
private apt against an empty dpkg status, unpacked with dpkg -x, and turned into
an ext4 image with mke2fs -d. Maintainer scripts never run.
"""
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

CACHE = Path(os.environ.get("VM_CACHE") or Path.home() / ".cache" / "blockvm")
MIRROR = os.environ.get("VM_MIRROR", "http://deb.debian.org/debian")
SECURITY = os.environ.get("VM_SECURITY", "http://deb.debian.org/debian-security")
KEYRING = os.environ.get("VM_KEYRING", "/usr/share/keyrings/debian-archive-keyring.gpg")

# Userland: newer glibc than any likely build host, so host-built binaries run.
ROOT_SUITE = "trixie"
# Kernels: every suite that carries one of the wanted series; the newest wins.
KERNEL_SUITES = ["bookworm", "trixie", "trixie-security", "sid"]

ROOT_PACKAGES = """
    base-files base-passwd bash coreutils dash util-linux mount sed grep gawk findutils
    tar gzip xz-utils diffutils procps psmisc kmod udev iproute2 iputils-ping tcpdump
    ethtool nftables e2fsprogs xfsprogs btrfs-progs fio mdadm dmsetup nbd-client
    nbdkit drbd-utils python3 strace socat jq busybox-static libgcc-s1 libc-bin
    hdparm sg3-utils perl-base openssl
""".split()

# Left out of the root. Manual pages and the like stay: tests copy /usr as a real tree of files.
ROOT_STRIPPED = ["usr/share/info"]

# Loaded from the initramfs; the rest comes from /lib/modules in the root.
BOOT_MODULES = ["virtio_pci", "virtio_blk", "virtio_console", "ext4"]


def sh(*cmd, **kw):
    return subprocess.run([str(c) for c in cmd], check=True, text=True, **kw)


def out(*cmd, **kw):
    return sh(*cmd, stdout=subprocess.PIPE, **kw).stdout


@contextlib.contextmanager
def locked():
    """Only one run at a time builds in the cache."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


class Apt:
    """A private apt: own sources, lists, cache and (empty) dpkg status."""

    def __init__(self, suites):
        self.dir = CACHE / ("apt-" + "+".join(suites))
        for d in ("lists/partial", "cache/archives/partial"):
            (self.dir / d).mkdir(parents=True, exist_ok=True)
        (self.dir / "status").touch()
        lines = []
        for s in suites:
            url = SECURITY if s.endswith("-security") else MIRROR
            lines.append(f"deb [signed-by={KEYRING}] {url} {s} main\n")
        (self.dir / "sources.list").write_text("".join(lines))
        d = self.dir
        self.opts = [
            f"-oDir::Etc::sourcelist={d}/sources.list", "-oDir::Etc::sourceparts=/dev/null",
            "-oDir::Etc::preferences=/dev/null", "-oDir::Etc::preferencesparts=/dev/null",
            f"-oDir::State={d}", f"-oDir::State::lists={d}/lists",
            f"-oDir::State::status={d}/status", f"-oDir::Cache={d}/cache",
            "-oAPT::Sandbox::User=", "-oAPT::Architecture=amd64", "-oAPT::Architectures=amd64",
            "-oAcquire::Languages=none", "-oDebug::NoLocking=1",
        ]

    def update(self):
        sh("apt-get", "-qq", *self.opts, "update")

    def versions(self, pkg):
        rows = out("apt-cache", *self.opts, "madison", pkg).splitlines()
        vers = {r.split("|")[1].strip() for r in rows}
        return sorted(vers, key=lambda v: [int(n) for n in re.findall(r"\d+", v)])

    def depends(self, pkg):
        rows = out("apt-cache", *self.opts, "depends", pkg).splitlines()
        return [r.split()[-1] for r in rows if re.match(r"\s*\|?(Pre)?Depends:", r)]

    def closure(self, pkgs):
        # apt leaves out what it has already fetched, so show it an empty archive: after an
        # interrupted build the list would otherwise be short.
        empty = self.dir / "empty"
        (empty / "partial").mkdir(parents=True, exist_ok=True)
        rows = out("apt-get", *self.opts, f"-oDir::Cache::Archives={empty}", "-qq", "--print-uris",
                   "--no-install-recommends", "install", *pkgs).splitlines()
        return [r.split()[1] for r in rows if r.startswith("'")]  # file names

    def fetch_closure(self, pkgs):
        names = self.closure(pkgs)
        sh("apt-get", *self.opts, "-qq", "-y", "--download-only", "--no-install-recommends",
           "install", *pkgs, stdout=subprocess.DEVNULL)
        return [self.dir / "cache/archives" / n for n in names]

    def fetch(self, pkgs, into):
        into.mkdir(parents=True, exist_ok=True)
        sh("apt-get", *self.opts, "-qq", "download", *pkgs, cwd=into)
        return sorted(into.glob("*.deb"))


def kernel(series, refresh=False):
    """series "6.12" or "6.12/amd64" (flavour; default cloud-amd64) -> unpacked directory."""
    series, _, flavour = series.partition("/")
    flavour = flavour or "cloud-amd64"
    link = CACHE / f"kernel-{series}-{flavour}"
    if link.exists() and not refresh:
        return link.resolve()
    apt = Apt(KERNEL_SUITES)
    apt.update()
    meta = f"linux-image-{flavour}"
    found = [v for v in apt.versions(meta) if v.startswith(series + ".")]
    if not found:
        raise SystemExit(f"no {meta} {series}.x in {' '.join(KERNEL_SUITES)}")
    image = next(d for d in apt.depends(f"{meta}={found[-1]}") if d.startswith("linux-image-"))
    abi = image.removeprefix("linux-image-")
    # Since 7.x the image package is only a shell around linux-binary-* and linux-modules-*.
    pkgs = [image] + [d for d in apt.depends(image) if d.endswith(abi)]
    dest = CACHE / "kernels" / abi
    if not (dest / "ready").exists():
        shutil.rmtree(dest, ignore_errors=True)
        for deb in apt.fetch(pkgs, dest / "deb"):
            sh("dpkg", "-x", deb, dest / "x")
        shutil.rmtree(dest / "deb")
        tree = dest / "x" / "lib/modules"
        if not tree.exists():
            tree = dest / "x" / "usr/lib/modules"
        (dest / "lib").mkdir()
        tree.rename(dest / "lib/modules")
        image_file = [*(dest / "x").glob("boot/vmlinuz-*"), *(dest / "lib/modules").glob("*/vmlinuz")]
        shutil.copy(image_file[0], dest / "vmlinuz")
        shutil.rmtree(dest / "x")
        sh("depmod", "-b", dest, abi)
        (dest / "ready").touch()
    link.unlink(missing_ok=True)
    link.symlink_to(dest)
    return dest


def root_id():
    """Names a userland by its recipe, so that two checkouts with different recipes share the cache."""
    recipe = "\n".join([ROOT_SUITE, *sorted(ROOT_PACKAGES), *sorted(ROOT_STRIPPED)])
    return hashlib.sha256(recipe.encode()).hexdigest()[:12]


def root_tree(refresh=False):
    """The unpacked userland, without a kernel's modules."""
    tree = CACHE / f"root-{root_id()}"
    stamp = tree / ".ready"
    if stamp.exists() and not refresh:
        return tree
    apt = Apt([ROOT_SUITE])
    apt.update()
    debs = apt.fetch_closure(ROOT_PACKAGES)
    shutil.rmtree(tree, ignore_errors=True)
    for d in ("bin", "sbin", "lib", "lib64"):  # merged /usr
        (tree / "usr" / d).mkdir(parents=True)
        (tree / d).symlink_to("usr/" + d)
    for deb in debs:
        sh("dpkg", "-x", deb, tree)
    # What the maintainer scripts would have done, as far as a test guest needs it.
    for d in ("proc", "sys", "dev", "run", "tmp", "guest", "mnt", "root", "etc/lvm"):
        (tree / d).mkdir(exist_ok=True, parents=True)
    for f in ("passwd", "group"):
        shutil.copy(tree / f"usr/share/base-passwd/{f}.master", tree / f"etc/{f}")
    (tree / "usr/bin/awk").unlink(missing_ok=True)
    (tree / "usr/bin/awk").symlink_to("gawk")
    (tree / "etc/mtab").unlink(missing_ok=True)
    (tree / "etc/mtab").symlink_to("/proc/self/mounts")
    for d in ROOT_STRIPPED:
        shutil.rmtree(tree / d, ignore_errors=True)
    stamp.touch()
    return tree


def root_image(kdir):
    """One ext4 image per kernel: the userland plus that kernel's modules."""
    img = kdir / f"root-{root_id()}.img"
    tree = root_tree()
    if img.exists():
        return img
    stage = kdir / "stage"
    shutil.rmtree(stage, ignore_errors=True)
    sh("cp", "-al", tree, stage)
    sh("cp", "-al", kdir / "lib/modules", stage / "usr/lib/modules")
    kib = int(out("du", "-sk", "--apparent-size", stage).split()[0])
    tmp = img.with_suffix(".new")
    tmp.unlink(missing_ok=True)
    sh("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-E", "root_owner=0:0",
       "-d", stage, tmp, f"{int(kib * 1.25) + 65536}k", stdout=subprocess.DEVNULL)
    shutil.rmtree(stage)
    tmp.rename(img)
    return img


def vmlinux(kdir):
    """The uncompressed kernel: booted by its PVH entry it skips the slow self-extraction."""
    elf = kdir / "vmlinux"
    if elf.exists():
        return elf
    blob = (kdir / "vmlinuz").read_bytes()
    for magic, tool in ((b"\x28\xb5\x2f\xfd", "zstd"), (b"\xfd7zXZ\x00", "xz"), (b"\x1f\x8b\x08", "gzip")):
        at = blob.find(magic)
        while at >= 0:
            p = subprocess.run([tool, "-dc"], input=blob[at:], capture_output=True)
            if p.stdout[:4] == b"\x7fELF":
                elf.write_bytes(p.stdout)
                return elf
            at = blob.find(magic, at + 1)
    return kdir / "vmlinuz"


def cpio(tree, dest, mode="wb"):
    names = subprocess.run(["find", ".", "-mindepth", "1"], cwd=tree, check=True, capture_output=True)
    with open(dest, mode) as f:
        subprocess.run(["cpio", "-o", "-H", "newc", "-R", "0:0", "--quiet"], cwd=tree, check=True,
                       input=names.stdout, stdout=f)
        f.write(b"\0" * (-f.tell() % 512))


def initramfs(kdir, init):
    """busybox, the boot modules in load order, and init."""
    dest = kdir / ("initramfs-" + hashlib.sha256(init.read_bytes()).hexdigest()[:12])
    if dest.exists():
        return dest
    t = kdir / "ird"
    shutil.rmtree(t, ignore_errors=True)
    for d in ("bin", "mod", "proc", "sys", "dev", "newroot"):
        (t / d).mkdir(parents=True)
    shutil.copy(root_tree() / "usr/bin/busybox", t / "bin/busybox")
    (t / "bin/sh").symlink_to("busybox")
    shutil.copy(init, t / "init")
    (t / "init").chmod(0o755)
    abi = next((kdir / "lib/modules").iterdir()).name
    order = []
    for m in BOOT_MODULES:
        for line in out("modprobe", "-d", kdir, "-S", abi, "--show-depends", m).splitlines():
            if line.startswith("insmod") and line.split()[1] not in order:
                order.append(line.split()[1])
    for i, ko in enumerate(order):
        name = Path(ko).name
        dst = t / "mod" / f"{i:02}-{name.removesuffix('.xz')}"
        if name.endswith(".xz"):
            dst.write_bytes(subprocess.run(["xz", "-dc", ko], check=True, capture_output=True).stdout)
        else:
            shutil.copy(ko, dst)
    cpio(t, t.with_suffix(".new"))
    t.with_suffix(".new").rename(dest)
    shutil.rmtree(t)
    return dest
