//! The server library on real servers: they start, survive being killed with their data, and never outlive us.
//!
//! Assumes that `./just setup` has run. Every test has folders and ports of its own.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use lomash::stack::{Nats, Postgres, Redis, Service, scratch};

/// Names the folder for the process that is to be killed; set only by the test that kills it.
const VICTIM_DIR: &str = "LOMASH_STACK_VICTIM_DIR";
/// How long orphans may take to be gone after their parent was killed.
const ORPHAN_TIMEOUT: Duration = Duration::from_secs(15);
/// How long anything local may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Sends `request` and reads until `until` appears.
fn talk(url: &str, request: &str, until: &str) -> std::io::Result<String> {
    let address = url.split_once("://").expect("a URL").1;
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    let mut buffer = [0; 4096];
    while !answer.contains(until) {
        match stream.read(&mut buffer)? {
            0 => return Err(std::io::Error::other(format!("closed after {answer:?}"))),
            read => answer.push_str(&String::from_utf8_lossy(&buffer[..read])),
        }
    }
    Ok(answer)
}

async fn query(url: &str, statement: &str) -> anyhow::Result<Vec<String>> {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await?;
    let connection = tokio::spawn(connection);
    let rows = client.simple_query(statement).await?;
    drop(client);
    connection.await??;
    Ok(rows
        .iter()
        .filter_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        })
        .collect())
}

/// Processes that live and have `needle` on their command line.
fn processes_with(needle: &Path) -> Vec<(u32, String)> {
    let needle = needle.to_str().expect("a UTF-8 path");
    fs::read_dir("/proc")
        .expect("/proc")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != std::process::id())
        .filter_map(|pid| Some((pid, fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?.replace('\0', " "))))
        .filter(|(_, command)| command.contains(needle))
        .collect()
}

fn lives(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('Z')))
}

fn children_of(parent: u32) -> Vec<u32> {
    let parent = parent.to_string();
    fs::read_dir("/proc")
        .expect("/proc")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| {
            fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
                stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)) == Some(parent.as_str())
            })
        })
        .collect()
}

#[tokio::test]
async fn nats_keeps_its_streams_when_killed() -> anyhow::Result<()> {
    let dir = scratch()?;
    let mut nats = Nats::start(dir.path()).await?;
    let url = nats.url();
    let create = r#"{"name":"KEPT","subjects":["kept.*"],"storage":"file","num_replicas":1}"#;
    let request = |subject: &str, body: &str| {
        format!("CONNECT {{\"verbose\":false}}\r\nSUB reply 1\r\nPUB {subject} reply {}\r\n{body}\r\n", body.len())
    };
    talk(&url, &request("$JS.API.STREAM.CREATE.KEPT", create), "\"did_create\":true")?;
    talk(&url, &request("kept.one", "hello"), "\"seq\":1")?;

    let pid = nats.pid().expect("it runs");
    nats.kill();
    assert_eq!(nats.pid(), None);
    assert!(!lives(pid));
    talk(&url, "PING\r\n", "PONG").expect_err("nobody listens");
    nats.restart().await?;
    assert_eq!(nats.url(), url, "a restart keeps the port");
    talk(&url, &request("$JS.API.STREAM.INFO.KEPT", ""), "\"messages\":1")?;

    // In order, and again.
    nats.stop().await?;
    nats.restart().await?;
    talk(&url, &request("kept.two", "hello"), "\"seq\":2")?;

    // The limits of the shipped configuration are in force.
    let info = talk(&url, "", "\r\n")?;
    assert!(info.contains("\"max_payload\":1048576"), "{info}");
    Ok(())
}

#[tokio::test]
async fn redis_keeps_its_keys_when_killed() -> anyhow::Result<()> {
    let dir = scratch()?;
    let mut redis = Redis::start(dir.path()).await?;
    let url = redis.url();
    talk(&url, "SET product:1 kitchen\r\n", "+OK")?;
    redis.kill();
    talk(&url, "PING\r\n", "PONG").expect_err("nobody listens");
    redis.restart().await?;
    assert_eq!(redis.url(), url);
    talk(&url, "GET product:1\r\n", "kitchen")?;
    redis.stop().await?;
    redis.restart().await?;
    talk(&url, "GET product:1\r\n", "kitchen")?;
    Ok(())
}

#[tokio::test]
async fn postgres_keeps_its_rows_when_killed() -> anyhow::Result<()> {
    let dir = scratch()?;
    let mut postgres = Postgres::start(dir.path()).await?;
    let url = postgres.url();
    query(&url, "CREATE TABLE kept (n int); INSERT INTO kept VALUES (1)").await?;
    assert_eq!(query(&url, "SHOW fsync").await?, ["on"], "what is measured here is durable");

    // With a backend in the middle of a statement, and its files still there.
    let busy = tokio::spawn({
        let url = url.clone();
        async move { query(&url, "SELECT pg_sleep(60)").await }
    });
    let started = Instant::now();
    while query(&url, "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'").await? != ["1"] {
        assert!(started.elapsed() < ANSWER_TIMEOUT, "the backend does not sleep");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let pid = postgres.pid().expect("it runs");
    let children = children_of(pid);
    assert!(children.len() > 2, "backends and helpers: {children:?}");
    postgres.kill();
    assert!(!lives(pid), "it is reaped when kill returns");
    // Their files and memory are closed by then; the kernel may still be busy with the rest of them.
    let started = Instant::now();
    while children.iter().any(|child| lives(*child)) {
        assert!(started.elapsed() < ANSWER_TIMEOUT, "backends outlived the kill");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    busy.await?.expect_err("its backend was killed");

    postgres.restart().await?;
    assert_eq!(postgres.url(), url, "a restart keeps port and password");
    assert_eq!(query(&url, "SELECT n FROM kept").await?, ["1"]);

    let other = postgres.create_database("other_1").await?;
    assert_eq!(query(&other, "SELECT current_database()").await?, ["other_1"]);
    postgres.create_database("no'quotes").await.expect_err("a name that needs quoting");

    // In order, and by a new owner who finds data and password.
    postgres.stop().await?;
    drop(postgres);
    let postgres = Postgres::start(dir.path()).await?;
    assert_eq!(query(&postgres.url(), "SELECT n FROM kept").await?, ["1"]);

    let pid = postgres.pid().expect("it runs");
    let owner = fs::metadata(format!("/proc/{pid}"))?.uid();
    assert_ne!(owner, 0, "it never runs as root");
    assert_eq!(fs::metadata(dir.path().join("password"))?.mode() & 0o777, 0o600);
    let log = fs::read_to_string(postgres.log())?;
    drop(postgres);
    assert!(!lives(pid));
    assert!(!log.contains("FATAL:  could not open"), "{log}");
    Ok(())
}

#[tokio::test]
async fn postgres_starts_below_a_folder_that_only_its_owner_enters() -> anyhow::Result<()> {
    let home = scratch()?;
    fs::set_permissions(home.path(), fs::Permissions::from_mode(0o700))?;
    let dir = home.path().join("clone/.data/postgres");
    let mut postgres = Postgres::start(&dir).await?;
    query(&postgres.url(), "CREATE TABLE kept (n int); INSERT INTO kept VALUES (7)").await?;
    postgres.kill();
    drop(postgres);

    let postgres = Postgres::start(&dir).await?;
    assert_eq!(query(&postgres.url(), "SELECT n FROM kept").await?, ["7"], "found again");
    let place = dir.join("data");
    if fs::symlink_metadata(&place)?.is_symlink() {
        // As root: the data is elsewhere, private, and says where it belongs.
        let data = fs::read_link(&place)?;
        let base = data.parent().expect("a folder");
        assert_eq!(fs::metadata(base)?.mode() & 0o777, 0o700);
        assert_eq!(PathBuf::from(fs::read_to_string(base.join("origin"))?), dir.canonicalize()?);
        assert!(postgres.note().expect("a note").contains(data.to_str().expect("UTF-8")));
        drop(postgres);
        fs::remove_dir_all(base)?;
        // Cleaned away behind our back: a new, empty cluster.
        let postgres = Postgres::start(&dir).await?;
        query(&postgres.url(), "SELECT n FROM kept").await.expect_err("a new cluster");
        let base = fs::read_link(&place)?.parent().expect("a folder").to_owned();
        drop(postgres);
        fs::remove_dir_all(base)?;
    } else {
        assert!(postgres.note().is_none());
    }
    Ok(())
}

#[tokio::test]
async fn a_paused_server_answers_when_it_is_resumed() -> anyhow::Result<()> {
    let dir = scratch()?;
    let (nats_dir, redis_dir, postgres_dir) = (dir.path().join("n"), dir.path().join("r"), dir.path().join("p"));
    let (mut nats, redis, mut postgres) =
        tokio::try_join!(Nats::start(&nats_dir), Redis::start(&redis_dir), Postgres::start(&postgres_dir))?;
    let url = postgres.url();
    let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await?;
    tokio::spawn(connection);

    postgres.pause()?;
    let asked = tokio::time::timeout(Duration::from_millis(300), client.simple_query("SELECT 1")).await;
    assert!(asked.is_err(), "an open connection must hang as well");
    postgres.resume()?;
    tokio::time::timeout(ANSWER_TIMEOUT, client.simple_query("SELECT 1")).await??;

    redis.pause()?;
    redis.resume()?;
    talk(&redis.url(), "PING\r\n", "PONG")?;

    // Killing and stopping work on a paused one too.
    nats.pause()?;
    nats.kill();
    nats.restart().await?;
    nats.pause()?;
    nats.stop().await?;
    postgres.pause()?;
    postgres.kill();
    postgres.restart().await?;
    postgres.pause()?;
    postgres.stop().await?;
    nats.pause().expect_err("it does not run");
    Ok(())
}

#[tokio::test]
async fn a_folder_serves_one_server() -> anyhow::Result<()> {
    let dir = scratch()?;
    let first = Redis::start(dir.path()).await?;
    let refused = Redis::start(dir.path()).await.expect_err("a living server has it");
    assert!(refused.to_string().contains("in use by process"), "{refused:#}");
    talk(&first.url(), "PING\r\n", "PONG")?;
    drop(first);
    Redis::start(dir.path()).await?;
    Ok(())
}

#[tokio::test]
async fn a_server_that_cannot_start_says_why() -> anyhow::Result<()> {
    let dir = scratch()?;
    fs::create_dir(dir.path().join("data"))?;
    fs::write(dir.path().join("data/appendonlydir"), "a file where a folder belongs")?;
    let error = Redis::start(dir.path()).await.expect_err("its data is unusable");
    let text = format!("{error:#}");
    assert!(text.contains("redis ended while it was starting") && text.contains("end of its log"), "{text}");
    Ok(())
}

#[tokio::test]
async fn a_service_is_started_stopped_and_watched() -> anyhow::Result<()> {
    let dir = scratch()?;
    let log = dir.path().join("service.log");
    let script = "trap 'echo bye; exit 0' TERM; echo \"hello $WHO\"; while :; do sleep 0.05; done";
    let mut service = Service::new("greeter", Path::new("/bin/sh"), &log).args(["-c", script]).env("WHO", "world");
    service.start()?;
    service.start().expect_err("it runs already");
    let started = Instant::now();
    while !fs::read_to_string(&log)?.contains("hello world") {
        assert!(started.elapsed() < ANSWER_TIMEOUT);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    service.stop().await?;
    assert!(fs::read_to_string(&log)?.ends_with("bye\n"));

    // One that ends by itself is noticed, and what it forked into its group ends with it.
    let marker = dir.path().join("marker");
    let script = format!("sh -c 'sleep 60; : {}' & exit 7", marker.display());
    let mut failing = Service::new("failing", Path::new("/bin/sh"), &log).args(["-c", &script]);
    failing.start()?;
    assert_eq!(failing.ended().await.code(), Some(7));
    assert_eq!(failing.pid(), None);
    let started = Instant::now();
    while !processes_with(&marker).is_empty() {
        assert!(started.elapsed() < ANSWER_TIMEOUT, "{:?}", processes_with(&marker));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    let missing = Service::new("missing", Path::new("/nonexistent/program"), &log).start().expect_err("no program");
    assert!(format!("{missing:#}").contains("could not start missing (/nonexistent/program)"), "{missing:#}");
    Ok(())
}

#[test]
fn servers_outlive_the_runtime_that_started_them() -> anyhow::Result<()> {
    // The parent-death signal follows the thread that forks: had a worker forked, this would kill the server.
    let dir = scratch()?;
    let start = tokio::runtime::Runtime::new()?.block_on(async {
        let path = dir.path().to_owned();
        tokio::spawn(async move { Redis::start(&path).await }).await
    });
    let redis = start??;
    std::thread::sleep(Duration::from_millis(100));
    talk(&redis.url(), "PING\r\n", "PONG")?;
    Ok(())
}

/// Not a test of its own: the process that the next test starts and kills.
#[tokio::test]
async fn victim() -> anyhow::Result<()> {
    let Some(dir) = std::env::var_os(VICTIM_DIR).map(PathBuf::from) else {
        return Ok(());
    };
    let (nats_dir, redis_dir, postgres_dir) = (dir.join("nats"), dir.join("redis"), dir.join("postgres"));
    let (nats, redis, postgres) =
        tokio::try_join!(Nats::start(&nats_dir), Redis::start(&redis_dir), Postgres::start(&postgres_dir))?;
    let mut service = Service::new("stubborn", Path::new("/bin/sh"), &dir.join("service.log"))
        .args(["-c", "trap '' TERM; sleep 600"]);
    service.start()?;
    redis.pause()?;
    let pids = [nats.pid(), redis.pid(), postgres.pid(), service.pid()].map(|pid| pid.expect("it runs"));
    fs::write(dir.join("pids.new"), pids.map(|pid| pid.to_string()).join("\n"))?;
    fs::rename(dir.join("pids.new"), dir.join("pids"))?;
    std::future::pending().await
}

#[tokio::test]
async fn no_child_outlives_a_parent_that_is_killed() -> anyhow::Result<()> {
    let dir = scratch()?;
    let mut victim = start_victim(dir.path())?;
    let pids = dir.path().join("pids");
    let started = Instant::now();
    while !pids.exists() {
        if let Some(status) = victim.try_wait()? {
            anyhow::bail!("the victim ended before it was killed: {status}");
        }
        if started.elapsed() > Duration::from_secs(60) {
            victim.kill()?;
            anyhow::bail!("the victim's servers did not start");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut pids: Vec<u32> = fs::read_to_string(&pids)?.lines().filter_map(|pid| pid.parse().ok()).collect();
    assert_eq!(pids.len(), 4);
    let backends = children_of(pids[2]);
    assert!(!backends.is_empty());
    pids.extend(backends);

    victim.kill()?;
    victim.wait()?;
    let started = Instant::now();
    loop {
        let living: Vec<u32> = pids.iter().copied().filter(|pid| lives(*pid)).collect();
        if living.is_empty() {
            break;
        }
        assert!(started.elapsed() < ORPHAN_TIMEOUT, "{living:?} of {pids:?} outlived their parent");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(processes_with(dir.path()).is_empty());

    // And the next start finds everything in order.
    let postgres = Postgres::start(&dir.path().join("postgres")).await?;
    assert_eq!(query(&postgres.url(), "SELECT 1").await?, ["1"]);
    Ok(())
}

/// Killed at once, in the middle of starting: also then nothing may stay.
#[tokio::test]
async fn no_child_outlives_a_parent_that_is_killed_while_it_starts_them() -> anyhow::Result<()> {
    let dir = scratch()?;
    // The first ones hit the making of the data, the later ones servers that read their settings or recover.
    for milliseconds in [30, 150, 400, 900, 100, 150, 200, 250, 300, 350, 400, 500] {
        let mut victim = start_victim(dir.path())?;
        tokio::time::sleep(Duration::from_millis(milliseconds)).await;
        victim.kill()?;
        victim.wait()?;
        let started = Instant::now();
        while !processes_with(dir.path()).is_empty() {
            assert!(started.elapsed() < ORPHAN_TIMEOUT, "after {milliseconds} ms: {:?}", processes_with(dir.path()));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    let postgres = Postgres::start(&dir.path().join("postgres")).await?;
    assert_eq!(query(&postgres.url(), "SELECT 1").await?, ["1"]);
    Ok(())
}

/// The victim as a script starts it in the background: a shell has such a process ignore SIGINT and SIGQUIT.
fn start_victim(dir: &Path) -> std::io::Result<Child> {
    Command::new("/bin/sh")
        .args(["-c", "trap '' INT QUIT; exec \"$0\" --exact victim --nocapture"])
        .arg(std::env::current_exe()?)
        .env(VICTIM_DIR, dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
}

/// Tokens, mails, logs with the names of customers: whoever else has an account on the machine sees none of it.
#[tokio::test]
async fn what_a_stack_writes_is_for_its_owner_alone() -> anyhow::Result<()> {
    let dir = scratch()?;
    let data = dir.path().join("data");
    // As an earlier version left it.
    fs::create_dir(&data)?;
    fs::set_permissions(&data, fs::Permissions::from_mode(0o755))?;
    fs::create_dir(data.join("nats"))?;
    fs::write(data.join("nats/nats.log"), "")?;
    let stack = lomash::up::Stack::start_servers(&data).await?;
    assert_eq!(fs::metadata(&data)?.permissions().mode() & 0o777, 0o700, "the folder");
    let (mut open, mut seen, mut folders) = (Vec::new(), 0, vec![data.clone()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let (path, kind) = entry.map(|entry| (entry.path(), entry.file_type()))?;
            let kind = kind?;
            // What a server keeps in its own folder is made by its own rules, and behind ours.
            if kind.is_symlink() || path.file_name().is_some_and(|name| name == "data") {
                continue;
            }
            seen += 1;
            let mode = fs::metadata(&path)?.permissions().mode() & 0o777;
            // The user of Postgres passes through its folder, if that is another one.
            let allowed = if path.ends_with("postgres") { 0o711 } else { 0o700 };
            if mode & !allowed != 0 {
                open.push(format!("{} {mode:03o}", path.display()));
            }
            if kind.is_dir() {
                folders.push(path);
            }
        }
    }
    assert!(open.is_empty() && seen > 8, "open to others: {open:#?}");
    stack.stop().await
}
