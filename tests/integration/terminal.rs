//! The programs as processes: what becomes of them when nobody reads what they print, when they are told to end while they
//! wait, and what they print on terminals of any width.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::CommandFactory as _;
use lomash::cli::Cli;
use lomash::stack::{Nats, free_port, scratch};
use lomash_contract::ContentType;
use lomash_tests::{JWT_SECRET, PATIENCE, World, encoded, eventually, nowhere, order, token};
use lomash_web::Role;
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::time::Instant;
use uuid::Uuid;

/// How long a program may take to end that is told to while it waits.
const END_BOUND: Duration = Duration::from_secs(2);

/// How long any command may take here.
const COMMAND_BOUND: Duration = Duration::from_secs(120);

/// The programs of this package under the names that they have where they are installed, in a folder of their own: `up` and
/// `demo` look for the services beside themselves.
fn installed() -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    for name in ["lomash", "product-service", "analytics-service", "notification-service"] {
        std::fs::hard_link(lomash::up::program(&format!("{name}-under-test"))?, folder.path().join(name))?;
    }
    Ok(folder)
}

fn program(name: &str) -> Result<Command> {
    let mut command = Command::new(lomash::up::program(&format!("{name}-under-test"))?);
    command.env_remove("COLUMNS").stdin(Stdio::null()).kill_on_drop(true);
    Ok(command)
}

/// The write end of a pipe that nobody reads.
fn closed_pipe() -> Result<Stdio> {
    let (reader, writer) = std::io::pipe()?;
    drop(reader);
    Ok(writer.into())
}

fn signal(child: &Child, signal: Signal) -> Result<()> {
    let pid = child.id().context("it runs")?;
    Ok(kill(Pid::from_raw(pid.cast_signed()), signal)?)
}

fn text(file: &Path) -> String {
    std::fs::read_to_string(file).unwrap_or_default()
}

// ── Told to end while waiting ───────────────────────────────────────────────────────────────────────────────────

/// A program that waits for something that is not there, with its log.
struct Waiter {
    what: String,
    child: Child,
    log: PathBuf,
}

impl Waiter {
    fn start(what: &str, mut command: Command, dir: &Path) -> Result<Self> {
        let log = dir.join(format!("{what}.log").replace(' ', "-"));
        let output = File::create(&log)?;
        let child = command.stdout(output.try_clone()?).stderr(output).spawn()?;
        Ok(Self { what: what.to_owned(), child, log })
    }

    /// Waits until it has said `count` times that it waits for `thing`, tells it to end, and returns how it ended, when it did
    /// so in time.
    async fn told_to_end(&mut self, thing: &str, count: usize, by: Signal) -> Result<ExitStatus> {
        let said = |log: &Path| text(log).lines().filter(|line| line.contains(thing)).count();
        let what = format!("{} to say `{thing}`", self.what);
        tokio::select! {
            status = self.child.wait() => {
                anyhow::bail!("{} ended before it was told to ({}): {}", self.what, status?, text(&self.log))
            }
            said = eventually(&what, PATIENCE, async || {
                let times = said(&self.log);
                ensure!(times >= count, "said {times} times: {}", text(&self.log));
                Ok(Some(()))
            }) => said?,
        }
        let told = Instant::now();
        signal(&self.child, by)?;
        let status = tokio::time::timeout(END_BOUND, self.child.wait()).await;
        let status = status.with_context(|| {
            format!("{} goes on for {} s after {by}: {}", self.what, told.elapsed().as_secs(), text(&self.log))
        })??;
        ensure!(!text(&self.log).contains("panicked"), "{}: {}", self.what, text(&self.log));
        Ok(status)
    }
}

const SERVICES: [&str; 3] = ["product-service", "analytics-service", "notification-service"];

fn service(name: &str, nats_url: &str) -> Result<Command> {
    let mut command = program(name)?;
    command
        .env("NATS_URL", nats_url)
        .env("DATABASE_URL", nowhere().expose())
        .env("HTTP_LISTEN", "127.0.0.1:0")
        .env("HEALTH_LISTEN", "127.0.0.1:0")
        .env("JWT_HS256_SECRET", JWT_SECRET);
    Ok(command)
}

#[tokio::test]
async fn a_service_that_waits_for_nats_says_so_and_ends_when_it_is_told_to() -> Result<()> {
    let dir = scratch()?;
    // Nobody listens; and somebody takes the connection and says nothing.
    let nobody = format!("nats://127.0.0.1:{}", free_port()?);
    let silent = TcpListener::bind("127.0.0.1:0").await?;
    let silent_url = format!("nats://{}", silent.local_addr()?);
    for (name, by) in SERVICES.into_iter().zip([Signal::SIGTERM, Signal::SIGINT, Signal::SIGTERM]) {
        for (how, url) in [("nobody", &nobody), ("silent", &silent_url)] {
            let mut waiter = Waiter::start(&format!("{name} {how}"), service(name, url)?, dir.path())?;
            let address = url.trim_start_matches("nats://");
            let status = waiter.told_to_end(&format!("waiting for NATS at {address}"), 2, by).await?;
            assert!(status.success(), "{name} {how}: {status}, {}", text(&waiter.log));
            let log = text(&waiter.log);
            assert!(log.contains("stopped before it was ready: interrupted while waiting for NATS"), "{log}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_service_that_waits_for_jetstream_ends_when_it_is_told_to() -> Result<()> {
    let dir = scratch()?;
    // A server that speaks NATS and has no JetStream: requests are never answered.
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("nats://{}", listener.local_addr()?);
    let server = tokio::spawn(async move {
        use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
        loop {
            let Ok((mut stream, _)) = listener.accept().await else { return };
            tokio::spawn(async move {
                let info = "INFO {\"server_id\":\"X\",\"version\":\"2.14.0\",\"max_payload\":1048576,\"headers\":true,\"proto\":1}\r\n";
                stream.write_all(info.as_bytes()).await?;
                let (reader, mut writer) = stream.into_split();
                let mut lines = BufReader::new(reader).split(b'\n');
                while let Some(line) = lines.next_segment().await? {
                    if line.starts_with(b"PING") {
                        writer.write_all(b"PONG\r\n").await?;
                    }
                }
                std::io::Result::Ok(())
            });
        }
    });
    for name in SERVICES {
        let mut waiter = Waiter::start(name, service(name, &url)?, dir.path())?;
        let status = waiter.told_to_end("waiting for JetStream to answer", 1, Signal::SIGTERM).await?;
        assert!(status.success(), "{name}: {status}, {}", text(&waiter.log));
    }
    server.abort();
    Ok(())
}

/// With NATS there and everything else away a service starts or waits, and ends as fast.
#[tokio::test]
async fn a_service_without_its_other_servers_ends_when_it_is_told_to() -> Result<()> {
    let world = World::without_postgres().await?;
    let away = format!("127.0.0.1:{}", free_port()?);
    for name in SERVICES {
        let mut command = service(name, &world.nats.url())?;
        command
            .env("REDIS_URL", format!("redis://{away}"))
            .env("WAREHOUSE_URL", format!("http://{away}/counts"))
            .env("SMTP_URL", format!("smtp://{away}"))
            .env("JWT_JWKS", format!("http://{away}/jwks.json"));
        let mut waiter = Waiter::start(name, command, world.dir())?;
        let status = waiter.told_to_end("no token can be checked with its keys", 1, Signal::SIGTERM).await?;
        assert!(status.success(), "{name}: {status}, {}", text(&waiter.log));
    }
    world.close();
    Ok(())
}

#[tokio::test]
async fn a_command_that_waits_says_for_what_and_ends_at_ctrl_c() -> Result<()> {
    let world = World::without_postgres().await?;
    // An order that nobody decides.
    world.publish(&order(&[(lomash_contract::ProductId(Uuid::new_v4()), 1)])).await?;
    let file = world.dir().join("orders");
    std::fs::write(&file, "")?;
    let nobody = format!("nats://127.0.0.1:{}", free_port()?);
    let url = world.nats.url();
    let orders = world.dir().join("orders.ndjson");
    std::fs::write(&orders, encoded(ContentType::Json, &order(&[(lomash_contract::ProductId(Uuid::new_v4()), 1)])).1)?;
    let orders = orders.to_str().context("a path")?;
    for (arguments, nats_url, thing) in [
        (&["verify"][..], &nobody, "waiting for NATS at"),
        (&["verify", "--wait=60"], &url, "waiting for all orders to be decided"),
        (&["orders", "replay", "--wait", orders], &url, "waiting for the orders to be decided"),
        (&["backup", "archive"], &nobody, "waiting for NATS at"),
        (&["streams", "diff"], &nobody, "waiting for NATS at"),
    ] {
        let mut command = program("lomash")?;
        command.args(arguments).current_dir(world.dir()).env("NATS_URL", nats_url).env_remove("DATABASE_URL");
        let mut waiter = Waiter::start(&arguments.join(" ").replace('/', "_"), command, world.dir())?;
        let status = waiter.told_to_end(thing, 2, Signal::SIGINT).await?;
        assert_eq!(status.code(), Some(130), "{arguments:?}: {}", text(&waiter.log));
        let log = text(&waiter.log);
        assert!(log.lines().any(|line| line.starts_with("interrupted while waiting for ")), "{arguments:?}: {log}");
    }
    world.close();
    Ok(())
}

/// A stack that is told to end while it starts, or runs, takes its servers with it.
#[tokio::test]
async fn a_stack_ends_at_ctrl_c() -> Result<()> {
    let (programs, dir) = (installed()?, scratch()?);
    for (arguments, sign) in
        [(&["up", "--data", "up"][..], ""), (&["up", "--data", "up"], "Ready."), (&["demo"], "Starting")]
    {
        let mut command = Command::new(programs.path().join("lomash"));
        command.args(arguments).current_dir(dir.path()).env("TMPDIR", dir.path()).kill_on_drop(true);
        command.env("NATS_SERVER", nats_server()?);
        let mut waiter = Waiter::start(&format!("{} {sign}", arguments[0]), command, dir.path())?;
        let is_ready = sign == "Ready.";
        let bound = if is_ready { Duration::from_secs(20) } else { END_BOUND };
        if sign.is_empty() {
            eventually("a server of its own", PATIENCE, async || Ok(dir.path().join("up/nats").is_dir().then_some(())))
                .await?;
        } else {
            eventually("its first words", PATIENCE, async || Ok(text(&waiter.log).contains(sign).then_some(())))
                .await?;
        }
        let told = Instant::now();
        signal(&waiter.child, Signal::SIGINT)?;
        let status = tokio::time::timeout(bound, waiter.child.wait()).await;
        let status = status.with_context(|| format!("{arguments:?} {sign} goes on: {}", text(&waiter.log)))??;
        println!("{arguments:?} {sign} ended after {} ms", told.elapsed().as_millis());
        assert_eq!(status.success(), is_ready, "{arguments:?} {sign}: {status}, {}", text(&waiter.log));
        if !is_ready {
            assert!(text(&waiter.log).contains("interrupted"), "{}", text(&waiter.log));
        }
    }
    Ok(())
}

/// The server that this package's tests use, for programs that run in another folder.
fn nats_server() -> Result<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.tools/nats-server");
    match std::env::var_os("NATS_SERVER") {
        Some(server) => Ok(server.into()),
        None if beside.is_file() => Ok(beside.canonicalize()?),
        None => Ok("nats-server".into()),
    }
}

// ── Nobody reads ────────────────────────────────────────────────────────────────────────────────────────────────

/// A world with something of everything in it, and a service that answers HTTP.
struct Shown {
    world: World,
    service: lomash::stack::Service,
    /// An empty server to restore into.
    empty: Nats,
}

impl Shown {
    async fn start() -> Result<Self> {
        let world = World::start().await?;
        let service = world.start_service("product").await?;
        let product = world.register("KIT-CABINET-600-OAK", 5).await?;
        let orders = [order(&[(product, 2)]), order(&[(product, 9)])];
        world.publish_all(&orders).await?;
        for payload in ["{ \"eventType\": \"order-created\" }", "no order at all"] {
            world.publish_raw(async_nats::HeaderMap::new(), payload).await?;
        }
        world.quiet().await?;
        let dir = world.dir();
        std::fs::write(dir.join("catalogue.csv"), "sku,name,category,quantity,threshold\nKIT-2,Tap,,3,\n")?;
        let retail = "Invoice,StockCode,Description,Quantity,InvoiceDate,Price,CustomerID\n\
                      1001,A1,Lamp,2,2009-12-01 07:45:00,1.5,77\n1002,A1,Lamp,few,2009-12-01 07:45:00,1.5,77\n";
        std::fs::write(dir.join("retail.csv"), retail)?;
        let empty = Nats::start(&dir.join("empty")).await?;
        let shown = Self { world, service, empty };
        ensure!(shown.run(&["backup", "archive"], Stdio::null(), Stdio::null()).await?.success(), "no archive");
        Ok(shown)
    }

    fn command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = program("lomash")?;
        let nats_url = if arguments[0] == "restore" { self.empty.url() } else { self.world.nats.url() };
        command
            .args(arguments)
            .current_dir(self.world.dir())
            .env("NATS_URL", nats_url)
            .env("DATABASE_URL", self.world.database_url().expose())
            .env("PRODUCT_URL", self.world.url("product"))
            .env("ADMIN_TOKEN", token(Role::Admin, Uuid::new_v4())?)
            .env("JWT_HS256_SECRET", JWT_SECRET)
            .env("TMPDIR", self.world.dir());
        Ok(command)
    }

    async fn run(&self, arguments: &[&str], stdout: Stdio, stderr: Stdio) -> Result<ExitStatus> {
        let mut child = self.command(arguments)?.stdout(stdout).stderr(stderr).spawn()?;
        let ended = tokio::time::timeout(COMMAND_BOUND, child.wait()).await;
        Ok(ended.with_context(|| format!("{arguments:?} does not end"))??)
    }

    async fn stop(mut self) -> Result<()> {
        self.service.stop().await?;
        self.world.close();
        Ok(())
    }
}

/// Every command that prints and ends, each so that it succeeds in [`Shown`], in an order in which it does.
const COMMANDS: [&[&str]; 25] = [
    &["token"],
    &["status"],
    &["status", "--json"],
    &["verify"],
    &["verify", "--json"],
    &["dlq", "list"],
    &["dlq", "list", "--json"],
    &["dlq", "show", "1"],
    &["dlq", "show", "1", "--raw"],
    &["dlq", "redrive", "--all", "--dry-run"],
    &["dlq", "redrive", "1", "--yes"],
    &["dlq", "discard", "2", "--yes"],
    &["streams", "diff"],
    &["streams", "apply"],
    &["replay", "INVENTORY"],
    &["replay", "ORDERS"],
    &["orders", "catalogue", "retail.csv"],
    &["orders", "replay", "retail.csv"],
    &["import", "catalogue.csv"],
    &["backup", "archive"],
    &["backup", "archive", "--check"],
    &["rebuild"],
    &["rebuild", "analytics", "--json"],
    &["reconcile", "--dry-run"],
    &["restore", "archive"],
];

/// Commands that are tried on their own, because they start servers; and one that prints nothing.
const OTHERS: [&str; 5] = ["up", "cluster", "demo", "bench", "mail-sink"];

/// Every command that clap knows is in one of the lists: a new one cannot be forgotten.
#[test]
fn every_command_is_tried() {
    fn leaves(command: &clap::Command, path: &str, found: &mut BTreeSet<String>) {
        let mut has_any = false;
        for inner in command.get_subcommands().filter(|inner| inner.get_name() != "help") {
            has_any = true;
            leaves(inner, format!("{path} {}", inner.get_name()).trim(), found);
        }
        if !has_any {
            found.insert(path.to_owned());
        }
    }
    let mut all = BTreeSet::new();
    leaves(&Cli::command(), "", &mut all);
    let tried = |path: &String| {
        let words: Vec<&str> = path.split(' ').collect();
        OTHERS.contains(&words[0]) || COMMANDS.iter().any(|arguments| arguments.starts_with(&words))
    };
    let forgotten: Vec<_> = all.iter().filter(|path| !tried(path)).collect();
    assert!(forgotten.is_empty(), "not tried: {forgotten:?}");
}

fn is_quiet(status: ExitStatus) -> bool {
    status.success() || status.signal() == Some(Signal::SIGPIPE as i32)
}

#[tokio::test]
async fn no_command_minds_that_nobody_reads_it() -> Result<()> {
    let shown = Shown::start().await?;
    for arguments in COMMANDS {
        let errors = shown.world.dir().join("errors");
        let status = shown.run(arguments, closed_pipe()?, File::create(&errors)?.into()).await?;
        let said = text(&errors);
        assert!(is_quiet(status), "{arguments:?}: {status}, {said}");
        assert!(!said.contains("panicked") && !said.contains("pipe"), "{arguments:?}: {said}");
    }
    // Nor that nobody hears its complaints, help and mistakes among them.
    for (arguments, code) in [
        (&["status"][..], 0),
        (&["orders", "catalogue", "retail.csv"], 0),
        (&["verify", "--wait=2", "--json"], 0),
        (&["replay", "INVENTORY"], 0),
        (&["--help"], 0),
        (&["dlq", "redrive", "--help"], 0),
        (&["backup", "--no-such-option"], 2),
        (&["dlq", "show", "999"], 1),
        (&["orders", "replay", "nowhere.csv"], 1),
    ] {
        let status = shown.run(arguments, closed_pipe()?, closed_pipe()?).await?;
        assert_eq!(status.code(), Some(code), "{arguments:?}: {status}");
    }
    // A disk that is full is no such matter.
    let errors = shown.world.dir().join("errors");
    let full = File::options().write(true).open("/dev/full")?;
    let status = shown.run(&["status", "--json"], full.into(), File::create(&errors)?.into()).await?;
    assert_eq!(status.code(), Some(1), "{}", text(&errors));
    assert!(text(&errors).starts_with("error: standard output cannot be written"), "{}", text(&errors));
    shown.stop().await
}

#[tokio::test]
async fn a_reader_that_takes_one_line_ends_what_would_go_on() -> Result<()> {
    let shown = Shown::start().await?;
    // More than a pipe holds, so that it is written to after it is closed.
    let products = futures::future::try_join_all((0..400).map(|number| {
        let world = &shown.world;
        async move { world.register(&format!("KIT-WITH-A-LONG-NAME-{number:04}"), 1).await }
    }));
    products.await?;
    let mut child = shown.command(&["replay", "INVENTORY"])?.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    {
        use tokio::io::AsyncBufReadExt as _;
        let output = child.stdout.take().context("its output")?;
        let line = tokio::io::BufReader::new(output).lines().next_line().await?.context("a line")?;
        assert!(line.starts_with('{'), "{line}");
    }
    let ended = tokio::time::timeout(COMMAND_BOUND, child.wait_with_output()).await??;
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(
        is_quiet(ended.status) && !said.contains("panicked") && !said.contains("error"),
        "{}: {said}",
        ended.status
    );
    shown.stop().await
}

/// A service that cannot log any more goes on.
#[tokio::test]
async fn a_service_whose_log_is_closed_goes_on() -> Result<()> {
    let world = World::without_postgres().await?;
    let mut command = service("product-service", &world.nats.url())?;
    let mut child = command.env("RUST_LOG", "debug").stdout(closed_pipe()?).stderr(closed_pipe()?).spawn()?;
    let product =
        eventually("it to take commands", PATIENCE, async || Ok(Some(world.register("KIT-1", 3).await?))).await?;
    let sold = order(&[(product, 1)]);
    world.publish(&sold).await?;
    world.decided([sold.payload.order_id]).await?;
    signal(&child, Signal::SIGTERM)?;
    let status = tokio::time::timeout(PATIENCE, child.wait()).await??;
    assert!(status.success(), "{status}");
    world.close();
    Ok(())
}

/// What starts servers: it ends them in order, whether anybody reads or not.
#[tokio::test]
async fn a_stack_does_not_mind_that_nobody_reads_it() -> Result<()> {
    let (programs, dir) = (installed()?, scratch()?);
    let start = |arguments: &[&str], errors: &Path| -> Result<Child> {
        let mut command = Command::new(programs.path().join("lomash"));
        command.args(arguments).current_dir(dir.path()).env("TMPDIR", dir.path()).kill_on_drop(true);
        command.env("NATS_SERVER", nats_server()?);
        Ok(command.stdout(closed_pipe()?).stderr(File::create(errors)?).spawn()?)
    };
    let errors = dir.path().join("up.errors");
    let mut up = start(&["up", "--data", "up"], &errors)?;
    let told = dir.path().join("up/stack.env");
    eventually("the stack to be up", PATIENCE, async || Ok(text(&told).contains("NOTIFICATION_URL").then_some(())))
        .await?;
    assert!(up.try_wait()?.is_none(), "it goes on: {}", text(&errors));
    signal(&up, Signal::SIGTERM)?;
    let status = tokio::time::timeout(PATIENCE, up.wait()).await??;
    assert!(status.success() && !text(&errors).contains("panicked"), "{status}: {}", text(&errors));
    assert!(!told.exists(), "it ended in order");

    for arguments in [&["demo"][..], &["bench", "--tiny", "--scenario", "hot"]] {
        let errors = dir.path().join("errors");
        let mut child = start(arguments, &errors)?;
        let status = tokio::time::timeout(COMMAND_BOUND, child.wait()).await??;
        assert!(is_quiet(status) && !text(&errors).contains("panicked"), "{arguments:?}, {status}: {}", text(&errors));
    }
    Ok(())
}

// ── Terminals of any width ──────────────────────────────────────────────────────────────────────────────────────

/// What a command prints on a terminal of so many columns.
async fn on_a_terminal(shown: &Shown, arguments: &[&str], columns: u16, rows: u16) -> Result<String> {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(Some(&size), None)?;
    let mut command = shown.command(arguments)?;
    let child = command.stdout(pty.slave.try_clone()?).stderr(pty.slave).spawn()?;
    drop(command);
    let mut master = File::from(pty.master);
    let reading = tokio::task::spawn_blocking(move || {
        let (mut all, mut part) = (Vec::new(), [0; 4096]);
        // A terminal whose other end is closed answers with an error.
        while let Ok(count @ 1..) = master.read(&mut part) {
            let _ = all.write_all(&part[..count]);
        }
        all
    });
    let output = child.wait_with_output().await?;
    ensure!(output.status.success(), "{arguments:?}: {}", output.status);
    Ok(String::from_utf8_lossy(&reading.await?).replace("\r\n", "\n"))
}

#[tokio::test]
async fn names_stay_whole_on_any_terminal() -> Result<()> {
    let shown = Shown::start().await?;
    let cases: [(&[&str], &[&str]); 8] = [
        (&["status"], &["ORDERS/product-orders", "INVENTORY/notification", "OBJ_SNAPSHOTS", "acknowledged"]),
        (&["verify"], &["acknowledged", "quantities", "reconciliations", "violations"]),
        (&["dlq", "list"], &["product-orders", "ORDERS"]),
        (&["dlq", "show", "1"], &["product-orders", "lomash.orders.created"]),
        (&["streams", "diff"], &["streams/"]),
        (&["backup", "archive"], &["DEAD_LETTERS", "NOTIFICATIONS"]),
        (&["orders", "replay", "retail.csv"], &["published", "cannot"]),
        (&["rebuild", "--dry-run"], &["movements", "order_decisions"]),
    ];
    for (arguments, names) in cases {
        for (columns, rows) in [(0, 0), (80, 24), (40, 20), (132, 50)] {
            let text = on_a_terminal(&shown, arguments, columns, rows).await?;
            let width = if columns == 0 { 80 } else { usize::from(columns) };
            // Without what a progress bar draws.
            let text = text.rsplit('\r').next().unwrap_or_default();
            for line in text.lines().filter(|line| !line.contains('\u{1b}')) {
                let is_whole = line.chars().count() <= width || line.split_whitespace().count() == 1;
                assert!(is_whole, "{arguments:?} on {columns} columns: {line:?} in\n{text}");
            }
            for name in names {
                let is_there =
                    text.split([' ', '\n', '│', ':', ',', '(', ')']).any(|word| word.trim_end_matches('.') == *name);
                assert!(is_there, "{arguments:?} on {columns} columns: no `{name}` in\n{text}");
            }
        }
    }
    // No terminal: a row is a line, however long; unless somebody says how wide it may be.
    let wide = shown.command(&["verify"])?.output().await?;
    let wide = String::from_utf8(wide.stdout)?;
    assert!(
        wide.lines().any(|line| line.contains("event ids, ") && line.contains("present, unchanged, once")),
        "{wide}"
    );
    let narrow = shown.command(&["verify"])?.env("COLUMNS", "60").output().await?;
    let narrow = String::from_utf8(narrow.stdout)?;
    let fits = |line: &str| line.chars().count() <= 60 || line.split_whitespace().count() == 1;
    assert!(narrow.lines().all(fits), "{narrow}");
    shown.stop().await
}
