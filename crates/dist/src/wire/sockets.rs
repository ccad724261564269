//! Processes of one machine over Unix sockets. They meet in a folder that belongs to one attempt of
//! one run: whoever is left over from an earlier attempt finds nobody there.

use super::frame::{HEADER_BYTES, Header, Kind};
use super::office::{Office, gone};
use super::post::Post;
use crate::CommError;
use crate::beside::Array;
use device::{DType, Device};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Between two looks for a rank that has not come yet.
const KNOCK_EVERY: Duration = Duration::from_millis(5);

/// Streams to every other rank, by rank.
pub(super) struct Sockets {
    streams: Vec<Option<Mutex<UnixStream>>>,
}

impl Sockets {
    pub(super) fn send(&self, to: usize, header: &Header, bytes: &[u8], limit: Duration) -> io::Result<()> {
        let Some(stream) = self.streams.get(to).and_then(Option::as_ref) else {
            return Err(io::Error::new(io::ErrorKind::NotFound, "no such rank"));
        };
        let mut stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
        stream.set_write_timeout(Some(limit.max(KNOCK_EVERY)))?;
        stream.write_all(&header.encode())?;
        stream.write_all(bytes)
    }

    pub(super) fn close(&self) {
        for stream in self.streams.iter().flatten() {
            let stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
            // A peer that is gone needs no goodbye.
            let _ = stream.shutdown(Shutdown::Write);
        }
    }
}

/// Meets the other ranks in `folder`: listens as `<rank>.sock` and knocks at every lower rank.
pub(super) fn join(
    folder: &Path,
    (rank, ranks): (usize, usize),
    deadline: Duration,
) -> Result<Arc<Office>, CommError> {
    let failed = |what: &str, error: io::Error| {
        CommError::Transport(format!("rank {rank} cannot {what} in {}: {error}", folder.display()))
    };
    let path = |rank: usize| folder.join(format!("{rank}.sock"));
    let listener = UnixListener::bind(path(rank)).map_err(|e| failed("listen", e))?;
    let start = Instant::now();
    let mut streams: Vec<Option<UnixStream>> = (0..ranks).map(|_| None).collect();
    for (lower, slot) in streams.iter_mut().enumerate().take(rank) {
        let stream = loop {
            match UnixStream::connect(path(lower)) {
                Ok(stream) => break stream,
                Err(_) if start.elapsed() < deadline => std::thread::sleep(KNOCK_EVERY),
                Err(error) => return Err(failed(&format!("reach rank {lower}"), error)),
            }
        };
        (&stream).write_all(&(rank as u32).to_le_bytes()).map_err(|e| failed("say its number", e))?;
        *slot = Some(stream);
    }
    listener.set_nonblocking(true).map_err(|e| failed("listen", e))?;
    while let Some(missing) = (rank + 1..ranks).find(|peer| streams[*peer].is_none()) {
        match accept(&listener, deadline) {
            Ok((peer, stream)) if peer > rank && peer < ranks && streams[peer].is_none() => {
                streams[peer] = Some(stream);
            }
            // Whoever it was is no rank of ours.
            Ok(_) => {}
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                return Err(failed("meet the others", error));
            }
            Err(_) if start.elapsed() < deadline => std::thread::sleep(KNOCK_EVERY),
            Err(_) => {
                let waited_s = start.elapsed().as_secs_f64();
                return Err(CommError::Transport(format!(
                    "rank {missing} did not come to {} within {waited_s:.1} s; is it running?",
                    folder.display()
                )));
            }
        }
    }
    // Everybody listened before it knocked, so nobody comes any more; the last one takes the folder
    // along, and nothing is left of a run whatever becomes of it.
    let _ = std::fs::remove_file(path(rank));
    let _ = std::fs::remove_dir(folder);
    open(rank, streams, deadline).map_err(|e| failed("start its readers", e))
}

fn accept(listener: &UnixListener, deadline: Duration) -> io::Result<(usize, UnixStream)> {
    let (mut stream, _) = listener.accept()?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(deadline))?;
    let mut peer = [0; 4];
    stream.read_exact(&mut peer)?;
    stream.set_read_timeout(None)?;
    Ok((u32::from_le_bytes(peer) as usize, stream))
}

/// One reader a peer: it takes everything at once, so that no sender waits for our computation.
fn open(rank: usize, streams: Vec<Option<UnixStream>>, deadline: Duration) -> io::Result<Arc<Office>> {
    let ranks = streams.len();
    let readers: Vec<Option<UnixStream>> = streams
        .iter()
        .map(|stream| stream.as_ref().map(UnixStream::try_clone).transpose())
        .collect::<io::Result<_>>()?;
    let sockets = Sockets { streams: streams.into_iter().map(|stream| stream.map(Mutex::new)).collect() };
    let office = Arc::new(Office::new(rank, ranks, deadline, Post::Sockets(sockets)));
    for (from, stream) in readers.into_iter().enumerate() {
        let Some(mut stream) = stream else { continue };
        let office = Arc::downgrade(&office);
        std::thread::Builder::new().name(format!("from-{from}")).spawn(move || {
            loop {
                let read = read(&mut stream);
                let Some(office) = office.upgrade() else { return };
                match read {
                    Ok((header, array)) => office.deliver(from, header, array),
                    Err(error) => return office.lost(from, &gone(&error)),
                }
            }
        })?;
    }
    Ok(office)
}

fn read(stream: &mut UnixStream) -> io::Result<(Header, Array)> {
    let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_string());
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header)?;
    let header = Header::decode(&header).ok_or_else(|| wrong("it sent what is no message"))?;
    let bytes = usize::try_from(header.payload).map_err(|_| wrong("it announced too many bytes"))?;
    if bytes % 2 == 1 {
        return Err(wrong("it announced half an element"));
    }
    // Whatever the elements are, they have even sizes; the type is put on where they are used.
    let dtype = header.dtype.filter(|dtype| header.kind == Kind::Data && bytes % dtype.size_bytes() == 0);
    let dtype = dtype.unwrap_or(DType::U16);
    let mut array =
        Array::new(Device::Cpu, dtype, bytes / dtype.size_bytes()).map_err(|e| wrong(&e.to_string()))?;
    stream.read_exact(array.view_mut().bytes())?;
    Ok((header, array))
}
