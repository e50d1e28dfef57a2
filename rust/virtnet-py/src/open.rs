//! From the options of `virtnet.spec` to a port: what a kind of port is called there is opened here.

use std::path::Path;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use virtnet_packet::Port;
use virtnet_ports::{
    AfPacketPort, AfXdpOptions, AfXdpPort, CaptureOptions, CapturePlace, Control, DgramWatch,
    Event, InterfaceWatch, OFFLOADS, Pace, PcapMode, PcapPort, PcapWatch, RingStatus, StreamWatch,
    TapPort, UserNetWatch, VhostUserOptions, VhostUserPort, VhostUserWatch, VirtioUserOptions,
    VirtioUserPort, VirtioUserWatch, VxlanWatch, XdpAttach, XdpMode,
};
use virtnet_virtio::net::control::Command;
use virtnet_virtio::{Features, RingFormat};

use crate::errors::{ConfigError, StateError, port_error};
use crate::ports;
use crate::recorder::Recorder;
use crate::sockets::{open_dgram, open_stream, open_vxlan, there};
use crate::stats::Session;
use crate::user_net;

/// A port, and whoever can be asked how its session stands.
pub(crate) struct Opened {
    /// The port, or its parts for different workers: at least one.
    pub(crate) lanes: Vec<Box<dyn Port>>,
    pub(crate) watch: Watch,
}

impl Opened {
    pub(crate) fn whole(port: impl Port + 'static, watch: Watch) -> Self {
        Self {
            lanes: vec![Box::new(port)],
            watch,
        }
    }
}

/// Asks a port how its session stands, wherever the port is.
#[derive(Clone, Debug)]
pub(crate) enum Watch {
    Pcap(PcapWatch),
    VhostUser(VhostUserWatch),
    VirtioUser(VirtioUserWatch),
    Interface(InterfaceWatch),
    Vxlan(VxlanWatch),
    Dgram(DgramWatch),
    Stream(StreamWatch),
    UserNet(UserNetWatch),
    /// There is no session: the other end is there as long as the port is.
    Always,
}

impl Watch {
    /// How the session stands; as if nobody were there when the port is gone.
    pub(crate) fn session(&self) -> Session {
        match self {
            Self::VhostUser(watch) => watch
                .status()
                .map_or_else(|_| Session::default(), Session::from),
            Self::VirtioUser(watch) => watch
                .status()
                .map_or_else(|_| Session::default(), Session::from),
            Self::Interface(watch) => Session::from(watch),
            Self::Vxlan(watch) => Session::from(watch),
            Self::Dgram(watch) => Session::from(watch),
            Self::Stream(watch) => Session::from(watch),
            Self::Pcap(watch) => Session::from(watch),
            Self::UserNet(watch) => Session::from(watch),
            Self::Always => Session::always(),
        }
    }

    /// The events from number `first` on, and how many were let go; readable also when the port is gone.
    pub(crate) fn events(&self, first: u64) -> (Vec<Event>, u64) {
        match self {
            Self::VhostUser(watch) => watch.events().since(first),
            Self::VirtioUser(watch) => watch.events().since(first),
            Self::Interface(watch) => watch.events().since(first),
            Self::Vxlan(watch) => watch.events().since(first),
            Self::Dgram(watch) => watch.events().since(first),
            Self::Stream(watch) => watch.events().since(first),
            Self::Pcap(_) | Self::UserNet(_) | Self::Always => (Vec::new(), 0),
        }
    }

    /// How the rings stand; none when the port is gone, or has none.
    pub(crate) fn rings(&self) -> Vec<RingStatus> {
        match self {
            Self::VhostUser(watch) => watch.rings().unwrap_or_default(),
            Self::VirtioUser(watch) => watch.rings().unwrap_or_default(),
            _ => Vec::new(),
        }
    }

    /// Takes the link of a port down, or up.
    pub(crate) fn set_link(&self, up: bool) -> PyResult<()> {
        match self {
            Self::VhostUser(watch) => watch.set_link(up).map_err(port_error),
            _ => Err(ConfigError::new_err(
                "only vhost-user ports have a link that can be taken down: that of others is the other end's",
            )),
        }
    }

    /// Has the device at the other end carry out a command; what it answers beside its verdict.
    pub(crate) fn ask(&self, py: Python<'_>, command: Command) -> PyResult<Vec<u8>> {
        match self {
            Self::VirtioUser(watch) => py.detach(|| watch.command(command)).map_err(port_error),
            _ => Err(StateError::new_err(
                "only a virtio-user port has a device at its other end that can be asked",
            )),
        }
    }

    /// Saves the state of the device at the other end, or loads one; what was saved.
    pub(crate) fn device_state(&self, py: Python<'_>, state: Option<Vec<u8>>) -> PyResult<Vec<u8>> {
        match self {
            Self::VirtioUser(watch) => {
                let saved = py.detach(|| watch.transfer_state(state));
                saved.map_err(port_error)
            }
            _ => Err(StateError::new_err(
                "only a virtio-user port has a device at its other end",
            )),
        }
    }

    /// How the sessions of many ports stand, in one visit to the thread that serves them for each kind of port.
    pub(crate) fn sessions(watches: &[Self]) -> Vec<Session> {
        let (mut backs, mut fronts) = (Vec::new(), Vec::new());
        for watch in watches {
            match watch {
                Self::VhostUser(watch) => backs.push(watch.clone()),
                Self::VirtioUser(watch) => fronts.push(watch.clone()),
                _ => {}
            }
        }
        let mut backs = VhostUserWatch::status_of_all(&backs).into_iter();
        let mut fronts = VirtioUserWatch::status_of_all(&fronts).into_iter();
        let session = |watch: &Self| match watch {
            Self::VhostUser(_) => backs.next()?.ok().map(Session::from),
            Self::VirtioUser(_) => fronts.next()?.ok().map(Session::from),
            other => Some(other.session()),
        };
        watches
            .iter()
            .map(session)
            .map(Option::unwrap_or_default)
            .collect()
    }
}

/// Who is to move the packets of a port.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Owner {
    /// So many workers, which finish what the receivers of packets are not to be left with.
    Workers(usize),
    /// Python: frames are to be finished when they arrive.
    Hands,
}

impl Owner {
    /// Features that its ports do not offer.
    fn without(self) -> Features {
        match self {
            Self::Workers(_) => Features::empty(),
            Self::Hands => OFFLOADS,
        }
    }
}

/// Opens a port for its owner, in as many parts as it wants; `control` serves its socket if it has one.
pub(crate) fn open(
    kind: &str,
    options: &Bound<'_, PyDict>,
    owner: Owner,
    control: &Control,
) -> PyResult<Opened> {
    let py = options.py();
    let workers = match owner {
        Owner::Workers(n) => n,
        Owner::Hands => 1,
    };
    match kind {
        "vhost-user" => {
            // A hash may point at any pair, and a worker sends by its own.
            let workers = if get(options, "rss")? { 1 } else { workers };
            let options = VhostUserOptions {
                client: get(options, "client")?,
                queue_pairs: get(options, "queue_pairs")?,
                mtu: get(options, "mtu")?,
                mac: get::<Option<String>>(options, "mac")?.and_then(|mac| parse_mac(&mac)),
                speed_mbps: get(options, "speed_mbps")?,
                postcopy: get(options, "postcopy")?,
                in_band: get(options, "in_band")?,
                without: Features::from_bits_retain(get(options, "without")?) | owner.without(),
                ..VhostUserOptions::new(get::<String>(options, "where")?)
            };
            let lanes = py
                .detach(|| VhostUserPort::in_lanes(options, workers, control))
                .map_err(port_error)?;
            let watch = lanes.first().map(VhostUserPort::watch);
            let boxed = |lane| -> Box<dyn Port> { Box::new(lane) };
            Ok(Opened {
                lanes: lanes.into_iter().map(boxed).collect(),
                watch: watch.map_or(Watch::Always, Watch::VhostUser),
            })
        }
        "virtio-user" => {
            let in_order = if get(options, "in_order")? {
                Features::empty()
            } else {
                Features::IN_ORDER
            };
            let format = match get::<String>(options, "ring")?.as_str() {
                "packed" => RingFormat::Packed,
                _ => RingFormat::Split,
            };
            let options = VirtioUserOptions {
                server: get(options, "server")?,
                queue_pairs: get(options, "queue_pairs")?,
                queue_size: get(options, "queue_size")?,
                format,
                control: get(options, "control")?,
                hash_report: get(options, "hash_report")?,
                iommu: get(options, "iommu")?,
                in_flight: get(options, "in_flight")?,
                in_band: get(options, "in_band")?,
                without: Features::from_bits_retain(get(options, "without")?)
                    | in_order
                    | owner.without(),
                ..VirtioUserOptions::new(get::<String>(options, "where")?)
            };
            let port = py
                .detach(|| VirtioUserPort::new(options, control))
                .map_err(port_error)?;
            let watch = Watch::VirtioUser(port.watch());
            Ok(Opened::whole(port, watch))
        }
        "tap" => open_tap(options, owner, control),
        "af-packet" => open_af_packet(options, workers, control),
        "user-net" => {
            let port = user_net::open(options)?;
            let watch = Watch::UserNet(port.watch());
            Ok(Opened::whole(port, watch))
        }
        "vxlan" => open_vxlan(options),
        "dgram" => open_dgram(options),
        "stream" => open_stream(options, control),
        "af-xdp" => open_af_xdp(options, workers, control),
        "pcap" => open_pcap(options),
        "columns" => {
            let recorder: Bound<'_, Recorder> = get(options, "recorder")?;
            Ok(Opened::whole(recorder.get().take_port()?, Watch::Always))
        }
        "memory" => {
            let end: Bound<'_, ports::Port> = get(options, "port")?;
            Ok(Opened {
                lanes: vec![end.get().take_over()?],
                watch: Watch::Always,
            })
        }
        _ => Err(ConfigError::new_err(format!(
            "there is no kind of port {kind:?}"
        ))),
    }
}

fn open_tap(options: &Bound<'_, PyDict>, owner: Owner, control: &Control) -> PyResult<Opened> {
    let name: String = get(options, "where")?;
    let (queues, mtu): (usize, Option<u32>) = (get(options, "queue_pairs")?, get(options, "mtu")?);
    let (lanes, watch) = there(options, || {
        let workers = match owner {
            Owner::Workers(n) => n,
            Owner::Hands => 1,
        };
        let mut lanes = TapPort::in_lanes(&name, queues, workers)?;
        if matches!(owner, Owner::Workers(_)) {
            lanes.iter_mut().try_for_each(TapPort::take_offloads)?;
        }
        if let (Some(mtu), Some(tap)) = (mtu, lanes.first().and_then(TapPort::interface)) {
            tap.set_mtu(mtu)?;
        }
        let watch = TapPort::watch(&mut lanes, control)?;
        Ok((lanes, watch))
    })?;
    let boxed = |lane| -> Box<dyn Port> { Box::new(lane) };
    Ok(Opened {
        lanes: lanes.into_iter().map(boxed).collect(),
        watch: watch.map_or(Watch::Always, Watch::Interface),
    })
}

fn open_af_packet(
    options: &Bound<'_, PyDict>,
    workers: usize,
    control: &Control,
) -> PyResult<Opened> {
    let name: String = get(options, "where")?;
    let (queues, promiscuous) = (get(options, "queues")?, get(options, "promiscuous")?);
    let (lanes, watch) = there(options, || {
        let mut lanes = AfPacketPort::in_lanes(&name, promiscuous, queues, workers)?;
        let watch = AfPacketPort::watch(&mut lanes, &name, control)?;
        Ok((lanes, watch))
    })?;
    let boxed = |lane| -> Box<dyn Port> { Box::new(lane) };
    Ok(Opened {
        lanes: lanes.into_iter().map(boxed).collect(),
        watch: Watch::Interface(watch),
    })
}

fn open_af_xdp(options: &Bound<'_, PyDict>, workers: usize, control: &Control) -> PyResult<Opened> {
    let wanted = AfXdpOptions {
        queues: get(options, "queues")?,
        ring_size: get(options, "ring_size")?,
        mode: match get::<String>(options, "mode")?.as_str() {
            "copy" => XdpMode::Copy,
            "zero-copy" => XdpMode::ZeroCopy,
            _ => XdpMode::Auto,
        },
        attach: match get::<String>(options, "attach")?.as_str() {
            "native" => XdpAttach::Native,
            "generic" => XdpAttach::Generic,
            _ => XdpAttach::Auto,
        },
        promiscuous: get(options, "promiscuous")?,
        ..AfXdpOptions::new(get::<String>(options, "where")?)
    };
    let lanes = there(options, || AfXdpPort::in_lanes(&wanted, workers, control))?;
    let watch = lanes.first().map(AfXdpPort::watch);
    let boxed = |lane| -> Box<dyn Port> { Box::new(lane) };
    Ok(Opened {
        lanes: lanes.into_iter().map(boxed).collect(),
        watch: watch.map_or(Watch::Always, Watch::Interface),
    })
}

/// Reads the form that `virtnet.spec` gives a MAC address.
pub(crate) fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let octets = text.split(':').map(|octet| u8::from_str_radix(octet, 16));
    octets.collect::<Result<Vec<_>, _>>().ok()?.try_into().ok()
}

fn open_pcap(options: &Bound<'_, PyDict>) -> PyResult<Opened> {
    let path: String = get(options, "where")?;
    let mode = match get::<String>(options, "mode")?.as_str() {
        "read" => {
            let pace = if get(options, "timed")? {
                Pace::Recorded
            } else {
                Pace::Fast
            };
            PcapMode::Read {
                looped: get(options, "loop")?,
                pace,
            }
        }
        _ => PcapMode::Write,
    };
    // What a capture knows besides, and a port of a file does not.
    let places: Vec<(String, String)> = options
        .get_item("places")?
        .map_or(Ok(Vec::new()), |value| value.extract())?;
    let place = |(name, filter)| CapturePlace { name, filter };
    let flag = |name| -> PyResult<bool> {
        let found = options.get_item(name)?;
        found.map_or(Ok(false), |value| value.extract())
    };
    let described = CaptureOptions {
        places: places.into_iter().map(place).collect(),
        pcap: flag("pcap")?,
        append: flag("append")?,
    };
    if matches!(mode, PcapMode::Write)
        && !described.append
        && Path::new(&path).is_file()
        && !get::<bool>(options, "overwrite")?
    {
        return Err(ConfigError::new_err(format!(
            "{path} exists already: choose another name, or say overwrite=on to write over it"
        )));
    }
    let port = options
        .py()
        .detach(|| match mode {
            PcapMode::Write => PcapPort::capture(&path, described),
            PcapMode::Read { .. } => PcapPort::open(&path, mode),
        })
        .map_err(port_error)?;
    let watch = port.watch().map_or(Watch::Always, Watch::Pcap);
    Ok(Opened::whole(port, watch))
}

/// One option. `virtnet.spec` has checked it, so a missing or odd one is a defect of the package.
pub(crate) fn get<'py, T>(options: &Bound<'py, PyDict>, name: &str) -> PyResult<T>
where
    T: for<'a> FromPyObject<'a, 'py>,
    for<'a> <T as FromPyObject<'a, 'py>>::Error: Into<PyErr>,
{
    let value = options.as_any().get_item(name)?;
    value.extract().map_err(Into::into)
}
