//! What a process and its children used so far and hold now, as /proc tells.

use std::fs::read_to_string;

use anyhow::Context as _;

/// Clock ticks a second in /proc: the kernel's interface fixes it, whatever the machine.
const TICKS_A_SECOND: f64 = 100.0;

/// Of a process with all its threads and children, also those that ended.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Usage {
    /// Processor time, user and system.
    pub cpu_seconds: f64,
    /// Sent to the disk.
    pub written_bytes: u64,
    /// In memory now; what processes share is counted once.
    pub resident_bytes: u64,
}

impl Usage {
    /// Of the process and everything below it.
    pub fn of(pid: u32) -> anyhow::Result<Self> {
        let children = children(pid);
        let mut all = Self::of_one(pid, !children.is_empty())?;
        for child in children {
            // One that ends meanwhile is counted with its parent the next time.
            if let Ok(usage) = Self::of_one(child, true) {
                all.cpu_seconds += usage.cpu_seconds;
                all.written_bytes += usage.written_bytes;
                all.resident_bytes += usage.resident_bytes;
            }
        }
        Ok(all)
    }

    fn of_one(pid: u32, shares: bool) -> anyhow::Result<Self> {
        let stat = read_to_string(format!("/proc/{pid}/stat"))?;
        // Its name may hold anything and ends with the last bracket.
        let (_, fields) = stat.rsplit_once(')').context("/proc/PID/stat has no name")?;
        let fields: Vec<&str> = fields.split_whitespace().collect();
        // utime, stime, cutime and cstime are the fields 14 to 17 of proc(5), of which two stand before here.
        let ticks = fields.get(11..15).context("/proc/PID/stat is short")?;
        let ticks = ticks.iter().map(|ticks| ticks.parse::<f64>()).sum::<Result<f64, _>>()?;
        let io = read_to_string(format!("/proc/{pid}/io"))?;
        let written = number(&io, "write_bytes:").context("/proc/PID/io tells no write_bytes")?;
        let resident = if shares {
            number(&read_to_string(format!("/proc/{pid}/smaps_rollup"))?, "Pss:")
        } else {
            number(&read_to_string(format!("/proc/{pid}/status"))?, "VmRSS:")
        };
        Ok(Self {
            cpu_seconds: ticks / TICKS_A_SECOND,
            written_bytes: written,
            resident_bytes: resident.context("the memory of the process is not told")? * 1024,
        })
    }
}

/// All processes below `pid`.
fn children(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    let mut next = vec![pid];
    while let Some(pid) = next.pop() {
        let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { continue };
        for task in tasks.flatten() {
            let children = read_to_string(task.path().join("children")).unwrap_or_default();
            let children = children.split_whitespace().filter_map(|child| child.parse().ok());
            next.extend(children.inspect(|child| found.push(*child)));
        }
    }
    found
}

fn number(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_and_its_children_are_counted() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep runs");
        let pid = std::process::id();
        assert!(children(pid).contains(&child.id()));
        let usage = Usage::of(pid).expect("read");
        assert!(usage.resident_bytes > 1024 * 1024 && usage.cpu_seconds >= 0.0, "{usage:?}");
        child.kill().expect("killed");
        child.wait().expect("reaped");
    }
}
