// The golden wire files, read and written again. Run it with the client's jar on the class path, and the folder.
import com.google.protobuf.Message;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.List;
import java.util.Map;

public class Wire {
  public static void main(String[] args) throws Exception {
    int count = 0;
    try (var files = Files.list(Path.of(args[0]))) {
      for (Path file : (Iterable<Path>) files.sorted()::iterator) {
        String name = file.getFileName().toString();
        if (!name.endsWith(".binpb")) {
          continue;
        }
        byte[] data = Files.readAllBytes(file);
        Class<?> type = Class.forName("dynamogrpc.v1." + name.substring(0, name.indexOf('.')));
        Message message = (Message) type.getMethod("parseFrom", byte[].class).invoke(null, (Object) data);
        check(message, name);
        if (!Arrays.equals(message.toByteArray(), data)) {
          throw new AssertionError(name + " is written in another way than it was read");
        }
        count++;
      }
    }
    System.out.println(count + " files are well");
  }

  private static void check(Message message, String name) {
    if (!message.getUnknownFields().asMap().isEmpty()) {
      throw new AssertionError(name + " has fields that nobody knows: " + message.getUnknownFields());
    }
    for (Map.Entry<?, Object> field : message.getAllFields().entrySet()) {
      for (Object value : field.getValue() instanceof List<?> all ? all : List.of(field.getValue())) {
        if (value instanceof Message inner) {
          check(inner, name);
        }
      }
    }
  }
}
