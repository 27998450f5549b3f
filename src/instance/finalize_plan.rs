//! What finalizing a clone takes: where its parts are, where they are to be, and whether that can be.
//!
//! A link of `pg_tblspc` may lead into the mount, to a place that replay believed in, or into the clone's folder; beneath
//! each of them are files of the clone, and those come to stand beside the data directory, in `<data>.tablespaces`.
//! The order is written into the folder, whose rest is removed when it has been carried out, the order last.

use std::ffi::OsString;
use std::fs;
use std::path::{Component, Path, PathBuf};

use crate::control::CloneState;
use crate::disk::{self, Owner, durable, private_area, state_file};
use crate::instance::clone_folder::{CloneFolder, CloneSpec, LastState, check_format, write_json};
use crate::instance::finalize::{FinalizeError, FinalizeOrder, TablespaceMove, TreeMove};
use crate::instance::isolation::socket_path;
pub use crate::instance::native_settings::Adoption;
use crate::instance::native_settings::{native_settings, not_private};
use crate::instance::places::{at, device_of, is_absent_or_empty, is_there, remove};
use crate::mount::mounting;
use crate::restore::target::{check_space, resolve, used_bytes};

/// Decides how a clone that is whole and stopped becomes a data directory at `to`, or in its own folder.
pub fn plan_order(
    folder: &CloneFolder,
    spec: &CloneSpec,
    to: Option<&Path>,
    adoption: Adoption<'_>,
) -> Result<FinalizeOrder, FinalizeError> {
    let (data, place) = (folder.upper().join("data"), place_of(folder, to)?);
    check_whole(folder, &data)?;
    let tablespaces = tablespaces(folder, spec, &data, &place)?;
    let told = folder.read_settings()?;
    if let Some(setting) = not_private(&told).filter(|_| adoption == Adoption::Private) {
        return Err(FinalizeError::NotPrivate { setting });
    }
    let is_copied = device_of(&data)? != device_of(&place)? || mounting::is_mount_point(&place);
    let order = FinalizeOrder {
        format: 1,
        name: spec.name.clone(),
        site: spec.site.clone(),
        owner: spec.owner,
        settings: native_settings(&told, &place, spec.major, adoption),
        data: TreeMove { from: data, to: place },
        wal: folder.pg_wal(),
        tablespaces,
        is_adopted: adoption != Adoption::Private,
        is_copied,
        pin: spec.pin.clone(),
    };
    check_own(folder, &order)?;
    for place in order.places() {
        if !is_absent_or_empty(place)? {
            return Err(FinalizeError::Taken { path: place.to_owned() });
        }
    }
    if !order.is_adopted {
        socket_path(&order.data.to, spec.port).map_err(FinalizeError::SocketPath)?;
    }
    if order.is_copied {
        check_space(&needs(&order))?;
    }
    Ok(order)
}

/// Checks, before a clone is stopped for it, that a place can be taken.
pub fn check_place(folder: &CloneFolder, to: Option<&Path>) -> Result<(), FinalizeError> {
    let place = place_of(folder, to)?;
    if is_absent_or_empty(&place)? { Ok(()) } else { Err(FinalizeError::Taken { path: place }) }
}

/// Writes the order down; from now on the clone can only be finalized.
pub fn write_order(folder: &CloneFolder, order: &FinalizeOrder) -> Result<(), disk::Error> {
    write_json(&folder.order_file(), order, "the order to finalize a clone")?;
    let message = format!("it is on its way to \"{}\"", order.data.to.display());
    folder.write_state(&LastState { message: Some(message), ..LastState::sound(CloneState::Stopped) })
}

/// Returns the order that was written, if one was.
///
/// # Errors
/// `Author` where somebody else than the caller has written it, `Strange` where it is not of this clone alone.
pub fn read_order(folder: &CloneFolder) -> Result<Option<FinalizeOrder>, FinalizeError> {
    let path = folder.order_file();
    let what = "the order to finalize a clone";
    let (order, author): (FinalizeOrder, Owner) = match state_file::read_owned_document(&path, what) {
        Err(error) if error.is_not_found() => return Ok(None),
        read => read?,
    };
    check_format(order.format, &path, what)?;
    if author.uid != Owner::current().uid {
        return Err(FinalizeError::Author { path, author });
    }
    check_own(folder, &order)?;
    Ok(Some(order))
}

/// Refuses to move or remove anything but what is in the clone's folder, on its own path: whose server ran there may have
/// put links in the way, for root to follow.
fn check_own(folder: &CloneFolder, order: &FinalizeOrder) -> Result<(), FinalizeError> {
    let real = folder.path().canonicalize().map_err(at("resolve", folder.path()))?;
    for path in order.trees().map(|tree| &tree.from).chain([&order.wal]) {
        let strange = || FinalizeError::Strange { path: path.clone() };
        let rest = path.strip_prefix(folder.path()).map_err(|_| strange())?;
        if rest.components().any(|part| part == Component::ParentDir) {
            return Err(strange());
        }
        // What is not there was brought already.
        if is_there(path) && path.canonicalize().ok() != Some(real.join(rest)) {
            return Err(strange());
        }
    }
    Ok(())
}

/// Removes what is left of the clone's folder once its order has been carried out.
///
/// The description goes before the order: without either nothing is a clone, and with the order alone this goes on.
pub fn clear_folder(folder: &CloneFolder, order: &FinalizeOrder) -> Result<(), disk::Error> {
    let path = folder.path();
    let is_inside = order.data.to.starts_with(path);
    // Once it is released its owner may have started it, with a log beside it.
    let own = order.data.to.file_name().unwrap_or_default().as_encoded_bytes();
    let is_beside = |left: &Path| {
        left.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(&[own, b"."].concat()))
    };
    let last = [folder.spec_file(), folder.order_file()];
    for entry in fs::read_dir(path).map_err(at("open directory", path))? {
        let left = entry.map_err(at("read directory", path))?.path();
        let is_result =
            is_inside && (is_beside(&left) || order.places().any(|place| place.starts_with(&left)));
        if !is_result && !last.contains(&left) {
            remove(&left)?;
        }
    }
    for file in &last {
        durable::remove_file(file)?;
    }
    if is_inside {
        return Ok(());
    }
    remove(path)?;
    durable::fsync_parent(path)
}

/// Returns where the tablespaces of a data directory come to stand.
fn tablespaces_beside(place: &Path) -> PathBuf {
    let mut name = place.file_name().map(OsString::from).unwrap_or_default();
    name.push(".tablespaces");
    place.with_file_name(name)
}

fn place_of(folder: &CloneFolder, to: Option<&Path>) -> Result<PathBuf, FinalizeError> {
    let Some(to) = to else { return Ok(folder.finalized_data()) };
    let place = resolve(to);
    // What bears a name there is a clone's: another `clone delete` would remove it.
    let clones = folder.path().parent().map(resolve);
    if clones.is_some_and(|clones| place.starts_with(clones)) || place.starts_with(resolve(folder.path())) {
        return Err(FinalizeError::Inside { path: place });
    }
    Ok(place)
}

/// Looks for what no clone is without, so that a folder somebody has worked in is told before anything is moved.
fn check_whole(folder: &CloneFolder, data: &Path) -> Result<(), FinalizeError> {
    let held = data.join(private_area::DIRECTORY_NAME).join("held");
    let held = private_area::HELD_BACK.map(|(_, name)| held.join(name));
    let directories = ["base", "global", "pg_xact", "pg_tblspc"].map(|name| data.join(name));
    let is_directory = |path: &PathBuf| fs::symlink_metadata(path).is_ok_and(|found| found.is_dir());
    let missing = directories.into_iter().chain([folder.pg_wal()]).find(|path| !is_directory(path));
    if let Some(path) = held.into_iter().find(|path| !path.exists()).or(missing) {
        return Err(FinalizeError::Missing { path });
    }
    // Every part of the clone says so itself.
    let uppers = folder.upper();
    for entry in fs::read_dir(&uppers).map_err(at("open directory", &uppers))? {
        let upper = entry.map_err(at("read directory", &uppers))?.path();
        let mark = upper.join(private_area::DIRECTORY_NAME).join(private_area::WHOLE_MARK);
        if !mark.exists() {
            return Err(FinalizeError::Missing { path: mark });
        }
    }
    Ok(())
}

fn tablespaces(
    folder: &CloneFolder,
    spec: &CloneSpec,
    data: &Path,
    place: &Path,
) -> Result<Vec<TablespaceMove>, FinalizeError> {
    let links = data.join("pg_tblspc");
    let mut found = Vec::new();
    for entry in fs::read_dir(&links).map_err(at("open directory", &links))? {
        let entry = entry.map_err(at("read directory", &links))?;
        // One that is a directory stays where it is.
        let (Ok(target), Ok(oid)) = (fs::read_link(entry.path()), entry.file_name().into_string()) else {
            continue;
        };
        if !oid.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let Some(from) = place_beneath(folder, &spec.stand_ins, &target) else { continue };
        if !from.is_dir() {
            return Err(FinalizeError::Missing { path: from });
        }
        let to = tablespaces_beside(place).join(&oid);
        found.push(TablespaceMove { oid, tree: TreeMove { from, to } });
    }
    found.sort_by(|a, b| a.oid.cmp(&b.oid));
    Ok(found)
}

/// Returns where in the clone's folder the files are that a link leads to; nothing where it leads elsewhere.
fn place_beneath(folder: &CloneFolder, stand_ins: &[(PathBuf, PathBuf)], target: &Path) -> Option<PathBuf> {
    let over = stand_ins.iter().filter(|(foreign, _)| target.starts_with(foreign));
    // A place within another has its own folder over it.
    let over = over.max_by_key(|(foreign, _)| foreign.components().count());
    let inside = match over {
        Some((foreign, own)) => own.join(target.strip_prefix(foreign).ok()?),
        None => target.to_owned(),
    };
    let inside: PathBuf = inside.components().collect();
    if inside.components().any(|part| part == Component::ParentDir) {
        return None;
    }
    match inside.strip_prefix(folder.mount_point().join("tablespaces")) {
        Ok(rest) => {
            let mut parts = rest.components();
            let oid = parts.next()?.as_os_str().to_str()?;
            let upper = folder.upper().join(format!("tablespace-{oid}")).join(parts.as_path());
            Some(upper.components().collect())
        }
        Err(_) => inside.starts_with(folder.path()).then_some(inside),
    }
}

/// Returns what a copy takes at each place.
fn needs(order: &FinalizeOrder) -> Vec<(PathBuf, u64)> {
    let trees = order.trees().map(|tree| (tree.to.clone(), used_bytes(&tree.from)));
    trees.chain([(order.data.to.clone(), used_bytes(&order.wal))]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_of_a_tablespace_are_found_wherever_its_link_leads() {
        let folder = CloneFolder::new(Path::new("/clones"), "one").unwrap();
        let stand_ins: [(PathBuf, PathBuf); 3] = [
            ("/srv/old".into(), "/clones/one/mnt/tablespaces/16385".into()),
            ("/srv/young".into(), "/clones/one/tablespaces/16400".into()),
            ("/srv/young/inner".into(), "/clones/one/tablespaces/16401".into()),
        ];
        let beneath = |target: &str| place_beneath(&folder, &stand_ins, Path::new(target));
        let upper = PathBuf::from("/clones/one/upper/tablespace-16385");
        assert_eq!(beneath("/clones/one/mnt/tablespaces/16385"), Some(upper.clone()));
        assert_eq!(beneath("/srv/old"), Some(upper));
        assert_eq!(beneath("/srv/young"), Some("/clones/one/tablespaces/16400".into()));
        assert_eq!(beneath("/srv/young/inner"), Some("/clones/one/tablespaces/16401".into()));
        assert_eq!(beneath("/clones/one/own"), Some("/clones/one/own".into()));
        assert_eq!(beneath("/srv/younger"), None);
        for out in
            ["/srv/old/../../pg_wal", "/clones/one/../two/upper", "/clones/one/mnt/tablespaces/1/../.."]
        {
            assert_eq!(beneath(out), None, "{out}");
        }
    }

    #[test]
    fn nothing_is_taken_from_where_a_link_leads_or_outside_the_folder() {
        let clones = tempfile::tempdir().unwrap();
        let folder = CloneFolder::new(clones.path(), "one").unwrap();
        fs::create_dir_all(folder.upper().join("data")).unwrap();
        fs::create_dir_all(folder.pg_wal()).unwrap();
        let outside = clones.path().join("outside");
        fs::create_dir(&outside).unwrap();
        let order = order(&folder, clones.path().join("main"));
        check_own(&folder, &order).unwrap();
        let check = |order: &FinalizeOrder| match check_own(&folder, order) {
            Err(FinalizeError::Strange { path }) => path,
            other => panic!("{other:?}"),
        };
        let link = folder.stand_ins();
        for target in [&*outside, Path::new("/nonexistent"), &folder.upper().join("data")] {
            std::os::unix::fs::symlink(target, &link).unwrap();
            let linked = FinalizeOrder { wal: link.clone(), ..order.clone() };
            assert_eq!(check(&linked), link, "{}", target.display());
            fs::remove_file(&link).unwrap();
        }
        for wal in [outside, folder.path().join("../outside")] {
            assert_eq!(check(&FinalizeOrder { wal: wal.clone(), ..order.clone() }), wal);
        }
        // What was brought is not there any more.
        fs::remove_dir_all(folder.pg_wal()).unwrap();
        check_own(&folder, &order).unwrap();
    }

    fn order(folder: &CloneFolder, to: PathBuf) -> FinalizeOrder {
        FinalizeOrder {
            format: 1,
            name: folder.name().to_owned(),
            site: "main".to_owned(),
            owner: (0, 0),
            data: TreeMove { from: folder.upper().join("data"), to },
            wal: folder.pg_wal(),
            tablespaces: Vec::new(),
            settings: Vec::new(),
            is_adopted: false,
            is_copied: false,
            pin: None,
        }
    }

    #[test]
    fn a_clone_of_which_a_part_is_not_whole_is_told() {
        let clones = tempfile::tempdir().unwrap();
        let folder = CloneFolder::new(clones.path(), "one").unwrap();
        let (data, space) = (folder.upper().join("data"), folder.upper().join("tablespace-16385"));
        for name in ["base", "global", "pg_xact", "pg_tblspc", ".walden/held"] {
            fs::create_dir_all(data.join(name)).unwrap();
        }
        fs::create_dir_all(space.join(".walden")).unwrap();
        fs::create_dir_all(folder.pg_wal()).unwrap();
        let missing = |data: &Path| match check_whole(&folder, data) {
            Err(FinalizeError::Missing { path }) => path,
            other => panic!("{other:?}"),
        };
        for file in [
            data.join(".walden/held/pg_control"),
            data.join(".walden/held/PG_VERSION"),
            data.join(".walden/whole"),
            space.join(".walden/whole"),
        ] {
            assert_ne!(missing(&data), Path::new(""));
            fs::write(file, "").unwrap();
        }
        check_whole(&folder, &data).unwrap();
        fs::remove_dir(data.join("pg_xact")).unwrap();
        assert_eq!(missing(&data), data.join("pg_xact"));
    }

    #[test]
    fn tablespaces_stand_beside_the_data_directory() {
        assert_eq!(tablespaces_beside(Path::new("/srv/pg/main")), Path::new("/srv/pg/main.tablespaces"));
    }

    #[test]
    fn the_folder_of_the_clones_is_no_place_and_a_clones_own_data_is() {
        let (clones, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let folder = CloneFolder::new(clones.path(), "one").unwrap();
        fs::create_dir_all(folder.upper()).unwrap();
        let link = elsewhere.path().join("link");
        std::os::unix::fs::symlink(clones.path(), &link).unwrap();
        for inside in [folder.path().join("elsewhere"), clones.path().join("prod"), link.join("prod")] {
            let error = check_place(&folder, Some(&inside)).unwrap_err();
            assert!(matches!(error, FinalizeError::Inside { .. }), "{error}");
        }
        check_place(&folder, None).unwrap();
        let place = elsewhere.path().join("place");
        check_place(&folder, Some(&place)).unwrap();
        fs::create_dir(&place).unwrap();
        check_place(&folder, Some(&place)).unwrap();
        fs::write(place.join("file"), "").unwrap();
        let error = check_place(&folder, Some(&place)).unwrap_err();
        assert!(matches!(&error, FinalizeError::Taken { .. }), "{error}");
        assert!(error.hint().is_some());
    }

    /// Killed after the description has gone, it goes on by the order; after that nothing of a clone is left.
    #[test]
    fn the_rest_of_the_folder_goes_and_the_order_goes_last() {
        for is_inside in [true, false] {
            let clones = tempfile::tempdir().unwrap();
            let folder = CloneFolder::new(clones.path(), "one").unwrap();
            fs::create_dir_all(folder.upper()).unwrap();
            let to = if is_inside { folder.finalized_data() } else { clones.path().join("main") };
            fs::create_dir_all(&to).unwrap();
            fs::write(to.join("PG_VERSION"), "15\n").unwrap();
            fs::write(folder.spec_file(), "{}").unwrap();
            let order = order(&folder, to.clone());
            write_order(&folder, &order).unwrap();
            assert_eq!(read_order(&folder).unwrap().as_ref(), Some(&order));
            write_order(&folder, &FinalizeOrder { format: 2, ..order.clone() }).unwrap();
            let later = read_order(&folder).unwrap_err().to_string();
            assert!(later.contains("its format is 2"), "{later}");
            write_order(&folder, &order).unwrap();
            fs::write(folder.path().join("data.log"), "of a server that runs").unwrap();
            fs::remove_file(folder.spec_file()).unwrap();
            clear_folder(&folder, &order).unwrap();
            assert!(to.join("PG_VERSION").exists());
            assert_eq!(folder.path().exists(), is_inside);
            assert_eq!(read_order(&folder).unwrap(), None);
            assert!(!folder.is_clone());
            assert!(!folder.upper().exists());
            assert_eq!(folder.path().join("data.log").exists(), is_inside);
        }
    }
}
