//! A file that a command writes: opened before anything is computed, whole or not there at all.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

/// An open output. What is written goes to a temporary file beside it, which takes its place in the end: a full disk or an
/// error on the way leaves an older file of this name as it was.
pub struct OutputFile {
    named: PathBuf,
    to: Target,
}

enum Target {
    Replaced {
        path: PathBuf,
        new: NamedTempFile,
    },
    /// A device or a pipe, which must not be replaced.
    Direct(File),
}

impl OutputFile {
    /// `inputs` are the files that are read: none of them may be written over.
    pub fn open(path: &Path, inputs: &[&Path]) -> Result<Self, String> {
        let words = |error: io::Error| format!("cannot write {}: {error}", path.display());
        let named = path.to_path_buf();
        // A link is followed, so that what it names is replaced and the link stays.
        let (path, old) = match std::fs::canonicalize(path) {
            Ok(path) => {
                let old = std::fs::metadata(&path).map_err(words)?;
                (path, Some(old))
            }
            // A link to nothing is replaced.
            Err(error) if error.kind() == io::ErrorKind::NotFound => (path.to_path_buf(), None),
            Err(error) => return Err(words(error)),
        };
        if inputs.iter().any(|input| std::fs::canonicalize(input).is_ok_and(|input| input == path)) {
            return Err(format!("{} is the input; the output must have another name", named.display()));
        }
        if let Some(old) = &old {
            if old.is_dir() {
                return Err(format!("cannot write {}: it is a folder", named.display()));
            }
            // A rename asks for no permission to write to the file that goes, so it is asked for here.
            let file = OpenOptions::new().write(true).open(&path).map_err(words)?;
            if !old.is_file() {
                return Ok(OutputFile { named, to: Target::Direct(file) });
            }
        }
        let folder = match path.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        let mut builder = tempfile::Builder::new();
        builder.prefix(".output-");
        #[cfg(unix)]
        let builder = {
            use std::os::unix::fs::PermissionsExt;
            // As for any new file: what the umask leaves of it. Temporary files are private otherwise.
            builder.permissions(std::fs::Permissions::from_mode(0o666))
        };
        let new = builder.tempfile_in(folder).map_err(words)?;
        if let Some(old) = old {
            new.as_file().set_permissions(old.permissions()).map_err(words)?;
        }
        Ok(OutputFile { named, to: Target::Replaced { path, new } })
    }

    pub fn path(&self) -> &Path {
        &self.named
    }

    /// Puts the file in its place.
    pub fn finish(mut self) -> Result<(), String> {
        let error = |error: io::Error| format!("cannot write {}: {error}", self.named.display());
        self.to.file().flush().map_err(error)?;
        match self.to {
            Target::Direct(_) => Ok(()),
            Target::Replaced { path, new } => {
                // A disk may find out only now that it is full.
                new.as_file().sync_all().map_err(error)?;
                new.persist(path).map(drop).map_err(|failed| error(failed.error))
            }
        }
    }
}

impl Target {
    fn file(&mut self) -> &mut File {
        match self {
            Target::Direct(file) => file,
            Target::Replaced { new, .. } => new.as_file_mut(),
        }
    }
}

impl Write for OutputFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.to.file().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.file().flush()
    }
}
